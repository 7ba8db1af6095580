"""Launch configurations as pure functions: sane for every shape, and every path is reached."""

from __future__ import annotations

import json
import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgrad.losses import LOSSES
from fastgrad.ops import tune

ARCHITECTURES = [*tune.KNOWN_ARCHITECTURES.values(), tune.INTERPRETER]
shapes = {
    "B": st.integers(1, 100_000),
    "N": st.integers(1, 262_144),
    "D": st.integers(1, 20_000),
    "loss": st.sampled_from(LOSSES),
    "arch": st.sampled_from(ARCHITECTURES),
}


def places(arch: tune.Architecture, options: tune.Options) -> int:
    """Programs that run at once, by their threads."""
    threads = 1024 if arch.version == 75 else 1536
    return arch.processors * max(1, min(16, threads // (options["num_warps"] * arch.threads)))


def estimate(B: int, N: int, D: int, loss: str, arch: tune.Architecture) -> float:
    """Microseconds by numbers moved and waves of programs, for an H100's bandwidth a processor."""
    options, tiles = tune.last_layer(B, N, D, loss, arch)
    programs = B * tiles or tune.cdiv(B, options["ROWS"])
    waves = tune.cdiv(programs, places(arch, options))
    rate = 5_700 * min(arch.processors, programs)
    return 2 * (1 + bool(tiles)) + waves + B * (N * (2 + bool(tiles)) + D) / rate


@settings(deadline=None, max_examples=500)
@given(**shapes)
@example(B=1, N=10, D=4096, loss="mse", arch=tune.KNOWN_ARCHITECTURES["sm_90"])
@example(B=4096, N=10, D=4096, loss="mse", arch=tune.KNOWN_ARCHITECTURES["sm_90"])
def test_no_long_serial_loop(B: int, N: int, D: int, loss: str, arch: tune.Architecture) -> None:
    options, tiles = tune.last_layer(B, N, D, loss, arch)
    for value in options.values():
        assert value >= 1
        assert value & (value - 1) == 0
    threads = options["num_warps"] * arch.threads
    assert threads <= 512
    if tiles:
        assert tiles == tune.cdiv(N, options["BLOCK_N"])
        features, programs, numbers = tune.chunk(D, tiles, 16), B * tiles, options["BLOCK_N"]
    else:
        assert options["BLOCK_N"] >= N
        features, programs, numbers = D, tune.cdiv(B, options["ROWS"]), options["ROWS"] * options["BLOCK_N"]
    assert numbers <= 32 * threads
    assert options.get("ROWS", 1) * options["BLOCK_D"] <= 32 * threads
    assert tune.cdiv(features, options["BLOCK_D"]) <= 4
    # Rows up to the longest are not shared, and longer ones have a program for every 1,024 logits at most.
    shared = tune.cdiv(N, 1024) if tiles else 1
    assert programs >= min(arch.processors, B * shared)


@settings(deadline=None, max_examples=500)
@given(**shapes | {"B": st.integers(1, 5_000), "arch": st.sampled_from(ARCHITECTURES[:-1])})
def test_no_cliff_between_a_batch_and_one_more(B: int, N: int, D: int, loss: str, arch: tune.Architecture) -> None:
    # Twice the tiles of one row may take exactly that much more, which rounds.
    assert estimate(B + 1, N, D, loss, arch) <= 1.4 * estimate(B, N, D, loss, arch) + 1e-9


def test_every_path_is_chosen_somewhere() -> None:
    arch = tune.KNOWN_ARCHITECTURES["sm_90"]
    assert tune.last_layer(4096, 10, 64, "bce", arch)[0]["ROWS"] > 1
    for B, warps in ((4096, 1), (64, 4)):
        options, tiles = tune.last_layer(B, 1000, 512, "bce", arch)
        assert (options["ROWS"], options["num_warps"], tiles) == (1, warps, 0)
    assert tune.last_layer(8, 128_256, 512, "bce", arch)[1] > 1


def test_measured_choices(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, file = tune.KNOWN_ARCHITECTURES["sm_90"], tmp_path / "tuned.json"
    shape = (100, 900, 500, "bce", arch)
    plain = tune.last_layer(*shape)
    monkeypatch.setenv("FASTGRAD_TUNED", str(file))
    try:
        for options, message in (({"num_warps": 3}, "num_warps = 3"), ({"BLOCK_N": 512}, "BLOCK_N = 512")):
            file.write_text(json.dumps({tune.bucket(*shape): options}))
            tune.measured.cache_clear()
            tune.last_layer.cache_clear()
            with pytest.raises(ValueError, match=f"tuned.json must give powers of two for .*{message}"):
                tune.last_layer(*shape)
        file.write_text(json.dumps({tune.bucket(*shape): {"num_warps": 8}}))
        tune.measured.cache_clear()
        # Shapes between the same powers of two.
        for size in ((100, 900, 500), (128, 1000, 512)):
            assert tune.last_layer(*size, "bce", arch) == ({**plain[0], "num_warps": 8}, plain[1])
        assert tune.last_layer(100, 900, 500, "mse", arch) == plain
    finally:
        tune.measured.cache_clear()
        tune.last_layer.cache_clear()


def test_the_page_names_every_architecture() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "explanation" / "kernels.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(("| NVIDIA", "| AMD"))]
    named = [name for line in lines for name in line.split(" | ")[1].split(", ")]
    assert [name if name.startswith("gfx") else f"sm_{name.removeprefix('sm_')}" for name in named] == [
        *tune.KNOWN_ARCHITECTURES
    ]
