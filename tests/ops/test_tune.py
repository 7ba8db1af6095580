"""Launch configurations as pure functions: sane for every shape, and every path is reached."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad.losses import LOSSES
from fastgrad.ops import tune

ARCHITECTURES = [*tune.KNOWN_ARCHITECTURES.values(), tune.INTERPRETER]
shapes = {
    "B": st.integers(1, 100_000),
    "N": st.integers(1, 262_144),
    "D": st.integers(1, 20_000),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "arch": st.sampled_from(ARCHITECTURES),
}


@settings(deadline=None, max_examples=200)
@given(**shapes)
def test_configurations_cover_their_shape(B: int, N: int, D: int, dtype: torch.dtype, arch: tune.Architecture) -> None:
    contrast, splits = tune.contrast(B, N, D, "brier", arch)
    assert "ROWS" not in contrast or contrast["BLOCK_N"] >= N
    assert splits == 1 or (splits > 1 and "ROWS" not in contrast)
    for value in contrast.values():
        assert value & (value - 1) == 0
    assert contrast.get("ROWS", 1) * contrast["BLOCK_N"] <= 1 << 14
    (head, _), (statistics, per_split) = (
        tune.linear_contrast(B, N, D, dtype, arch), tune.linear_stats(B, N, D, dtype, arch, "brier"),
    )  # fmt: skip
    assert per_split >= 1
    for config in (head, statistics):
        element = 4 if dtype == torch.float32 else 2
        buffers = config["num_stages"] - 1 if arch.backend == "hip" else config["num_stages"]
        assert buffers * (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * element <= arch.shared_memory
        assert config["PARTS"] & (config["PARTS"] - 1) == 0


def test_every_path_is_chosen_somewhere() -> None:
    arch, half = tune.KNOWN_ARCHITECTURES["sm_90"], torch.bfloat16
    assert tune.contrast(4096, 1000, 512, "bce", arch)[0]["ROWS"] == 1
    assert tune.contrast(4096, 10, 512, "bce", arch)[0]["ROWS"] > 1
    for B, several in ((4096, False), (4, True)):
        config, splits = tune.contrast(B, 128_256, 512, "bce", arch)
        assert "ROWS" not in config
        assert (splits > 1) is several
    assert tune.linear_contrast(32, 1000, 2048, half, arch)[1] == 0
    assert tune.linear_contrast(1024, 32_000, 4096, half, arch)[1] > 0
    assert tune.linear_stats(1024, 128_256, 4096, half, arch)[1] > 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_with_the_registers_of_sm_80_has_its_blocks(loss: str) -> None:
    known = tune.KNOWN_ARCHITECTURES["sm_80"]
    first, second = (
        tune.contrast(4096, 262_144, 4096, loss, arch) for arch in (known, dataclasses.replace(known, version=86))
    )
    assert first == second


def test_a_serving_batch_fills_the_device() -> None:
    for arch in tune.KNOWN_ARCHITECTURES.values():
        for B in (1, 32):
            config, _ = tune.linear_contrast(B, 32_000, 4096, torch.bfloat16, arch)
            assert tune.cdiv(32_000, config["BLOCK_N"]) >= arch.processors


def test_rows_of_logits_that_are_no_whole_16_bytes_have_smaller_tiles() -> None:
    """With the others', the compiled kernels spill: see `bench.gpu.compile_cases`."""
    for name, arch in tune.KNOWN_ARCHITECTURES.items():
        whole, parted = (tune.linear_contrast(1024, N, 768, torch.bfloat16, arch)[0] for N in (50_256, 50_257))
        assert parted["BLOCK_N"] == whole["BLOCK_N"] // 2
        # As many logits by twice the threads, or half of them.
        for loss in ("bce", "mse", "brier"):
            assert tune.contrast(16, 50_257, 768, loss, arch)[0]["num_warps"] == (16 if name.startswith("sm") else 8)
        whole, parted = (tune.contrast(16, N, 768, "cross_entropy", arch)[0] for N in (50_256, 50_257))
        assert parted["BLOCK_N"] == whole["BLOCK_N"] // 2
