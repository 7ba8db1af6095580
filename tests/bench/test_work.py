"""The bytes and operations that a GPU run is held against are those of the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts in Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from bench.gpu import work
from bench.gpu.sanitize.interpreter import Watcher, watching
from fastgrad.ops import tune
from fastgrad.ops.tune import INTERPRETER, ContrastConfig, LinearConfig

HALF, SINGLE = torch.float16, torch.float32


def _head(B: int, N: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=made).to(dtype) for s in ((B, D), (B, N), (N, D), (N,)))


class Counts(Watcher):
    """Bytes of loads and stores, operations of products."""

    loaded = stored = product = 0

    def load(self, addresses: np.ndarray, width: int) -> None:
        self.loaded += addresses.size * width

    def store(self, addresses: np.ndarray, width: int) -> bool:
        self.stored += addresses.size * width
        return False


def _counted(call: Callable[[], object]) -> Counts:
    counts, plain = Counts(), InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counts.product += 2 * a.data.size * b.data.shape[-1]
        return plain(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patched, watching(counts):
        patched.setattr(InterpreterBuilder, "create_dot", dot)
        call()
    return counts


def _compare(counts: Counts, launches: list[work.Work]) -> None:
    assert counts.loaded == sum(w.loaded for w in launches)
    assert counts.stored == sum(w.stored for w in launches)
    assert counts.product == sum(w.product for w in launches)


@pytest.mark.parametrize(
    "config",
    [
        ContrastConfig("rows", 64, 16, rows=2),
        ContrastConfig("stream", 16, 16),
        ContrastConfig("split", 16, 16, splits=3),
    ],
)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_contrast(config: ContrastConfig, dtype: torch.dtype) -> None:
    from fastgrad.ops.triton import contrast

    B, N, D = 3, 50, 40
    h, z, _, _ = _head(B, N, D, dtype)
    with tune.override(contrast=config):
        counts = _counted(lambda: contrast.contrast_sqnorm(h, z, "cross_entropy", True, False, False))
        launches = work.contrast(B, N, D, dtype, INTERPRETER)
    _compare(counts, launches)


@pytest.mark.parametrize("kind", ["ones", "predicted"])
def test_target(kind: str) -> None:
    from fastgrad.ops.triton import target

    h, z, _, _ = _head(3, 50, 40, HALF)
    call = lambda: target.target_sqnorm(h, z, None, kind, "cross_entropy", True, False, False)  # noqa: E731
    _compare(_counted(call), work.target(3, 50, 40, HALF, INTERPRETER, kind))


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("in_loop", [False, True])
def test_linear_contrast(chunks: int, in_loop: bool) -> None:
    from fastgrad.ops.triton import linear_contrast

    B, N, D = 20, 50, 40
    h, _, weight, bias = _head(B, N, D, HALF)
    config = LinearConfig(16, 16, 16, 1, chunks, 32, 4, 1, in_loop, "ieee", 4, 3)
    with tune.override(linear_contrast=config):
        counts = _counted(
            lambda: linear_contrast.linear_contrast_sqnorm(h, weight, bias, "cross_entropy", False, False)
        )
        launches = work.linear_contrast(B, N, D, HALF, INTERPRETER)
    _compare(counts, launches)


def test_linear_stats() -> None:
    from fastgrad.ops.triton import linear_contrast

    B, N, D = 20, 50, 40
    h, _, weight, bias = _head(B, N, D, HALF)
    config = LinearConfig(16, 16, 16, 1, 0, 0, 4, 2, False, "ieee", 4, 3)
    with tune.override(linear_stats=config):
        counts = _counted(
            lambda: linear_contrast.linear_contrast_stats(h, weight, bias, "cross_entropy", False)
        )
        launches = work.linear_stats(B, N, D, HALF, INTERPRETER)
    _compare(counts, launches)
