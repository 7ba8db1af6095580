"""Launch configurations as pure functions: sane for every shape, and every path is reached."""

from __future__ import annotations

import pathlib

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    assert 1 <= splits <= (1 if "ROWS" in contrast else tune.MOST_SPLITS)
    for value in contrast.values():
        assert value & (value - 1) == 0
    assert contrast.get("ROWS", 1) * contrast["BLOCK_N"] <= 1 << 14
    statistics, tiles = tune.linear_stats(B, N, D, dtype, arch, "bce")
    assert tiles >= 1
    buffers = statistics["num_stages"] - 1 if arch.backend == "hip" else statistics["num_stages"]
    stage = (statistics["BLOCK_M"] + statistics["BLOCK_N"]) * statistics["BLOCK_K"] * dtype.itemsize
    assert buffers * stage <= arch.shared_memory
    if arch.backend == "hip":
        # Each of 64 threads loads 16 bytes of the smaller operand.
        smaller = min(statistics["BLOCK_M"], statistics["BLOCK_N"]) * statistics["BLOCK_K"] * dtype.itemsize
        assert statistics["num_warps"] <= max(1, smaller // 1024)


@settings(deadline=None, max_examples=300)
@given(B=st.integers(1, 2_000), N=st.integers(16_385, 262_144), arch=st.sampled_from(ARCHITECTURES[:-1]))
def test_programs_fill_whole_waves(B: int, N: int, arch: tune.Architecture) -> None:
    places = 2 * arch.processors

    def waves(rows: int) -> tuple[float, float]:
        """Return the share of places taken in all waves, and their time by the estimate."""
        _, splits = tune.contrast(rows, N, 512, "cross_entropy", arch)
        count = tune.cdiv(rows * splits, places)
        time = count * (N / splits / tune.LOGITS + tune.PROGRAM) + tune.LAUNCH * (splits > 1)
        return rows * splits / (count * places), time

    taken, time = waves(B)
    # Shorter rows are not worth a second launch.
    if N >= 1 << 16:
        assert taken >= 0.7 or places > B
        # One row more never takes twice as long, as it would in a wave of its own.
        assert waves(B + 1)[1] <= 1.7 * time


@settings(deadline=None, max_examples=300)
@given(**shapes | {"B": st.integers(1, 2_000)})
@example(B=1, N=65_537, D=1, dtype=torch.float16, arch=tune.KNOWN_ARCHITECTURES["gfx950"])
def test_the_product_fills_the_device(B: int, N: int, D: int, dtype: torch.dtype, arch: tune.Architecture) -> None:
    for rows in (B, B + 1):
        config, tiles = tune.linear_stats(rows, N, D, dtype, arch)
        tiles_m, tiles_n = tune.cdiv(rows, config["BLOCK_M"]), tune.cdiv(N, config["BLOCK_N"])
        programs = tiles_m * tune.cdiv(tiles_n, tiles)
        assert programs >= min(arch.processors, tune.cdiv(rows, 16) * tune.cdiv(N, 16))
        assert tune.cdiv(tiles_n, tiles) <= tune.MOST_PARTS


def test_every_path_is_chosen_somewhere() -> None:
    arch, half = tune.KNOWN_ARCHITECTURES["sm_90"], torch.bfloat16
    assert tune.contrast(4096, 10, 512, "bce", arch)[0]["ROWS"] > 1
    for B, warps in ((4096, 1), (64, 4)):
        config, splits = tune.contrast(B, 1000, 512, "bce", arch)
        assert (config["ROWS"], config["num_warps"], splits) == (1, warps, 1)
    for B, several in ((264, False), (265, True), (4, True)):
        config, splits = tune.contrast(B, 128_256, 512, "bce", arch)
        assert "ROWS" not in config
        assert (splits > 1) is several
    assert tune.linear_stats(1024, 128_256, 4096, half, arch)[1] > 1


def test_unaligned_rows() -> None:
    """Otherwise the compiled kernels spill: see `bench.gpu.compile_cases`."""
    for name, arch in tune.KNOWN_ARCHITECTURES.items():
        # As many logits by twice the threads, or half of them.
        for loss in ("mse", "brier"):
            options = tune.contrast(4096, 50_257, 768, loss, arch)[0]
            # On AMD, 64 threads a warp read 16 bytes of half precision each.
            assert options["num_warps"] == (16 if name.startswith("sm") else min(8, options["BLOCK_N"] // 512))
        whole, parted = (tune.contrast(4096, N, 768, "cross_entropy", arch)[0] for N in (50_256, 50_257))
        assert parted["BLOCK_N"] <= whole["BLOCK_N"] // 2


def test_the_page_names_every_architecture() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "explanation" / "kernels.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(("| NVIDIA", "| AMD"))]
    named = [name for line in lines for name in line.split(" | ")[1].split(", ")]
    assert [name if name.startswith("gfx") else f"sm_{name.removeprefix('sm_')}" for name in named] == [
        *tune.KNOWN_ARCHITECTURES
    ]
