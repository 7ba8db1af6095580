"""Every kernel on every path, with shapes that leave blocks incomplete, single or empty.

To add a kernel, add its calls to `cases`, and to `huge` shapes of more than 2^31 elements in each of its operands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu import compile_cases
from fastgrad.losses import LOSSES
from fastgrad.ops.triton import contrast, layer_sqnorm, linear_contrast, target
from fastgrad.ops.tune import ContrastConfig, DirectConfig, GramConfig, LinearConfig, TargetConfig

# Blocks shorter than a row, so that every loop and every merge runs. HEADS: who finishes a row (the last tile of its
# block or a second launch), and where the features' norm comes from.
HEAD = LinearConfig(
    block_m=16, block_n=16, block_k=16, group_m=2, chunks=0, block_f=16, parts=2, tiles_per_split=2,
    norm_in_loop=False, precision="ieee", num_warps=4, num_stages=2,
)  # fmt: skip
CONTRAST = {
    "rows": ContrastConfig("rows", block_n=64, block_d=16, rows=4, num_warps=1),
    "stream": ContrastConfig("stream", block_n=32, block_d=16, num_warps=1),
    "split": ContrastConfig("split", block_n=32, block_d=16, splits=2, num_warps=1),
}
HEADS = {
    "last": HEAD,
    "last, norm in loop": dataclasses.replace(HEAD, norm_in_loop=True, group_m=1),
    "launch": dataclasses.replace(HEAD, chunks=2),
}
LAYERS = {"layer_direct": DirectConfig(16, 16, 16, "ieee", 4, 2), "layer_gram": GramConfig(16, 16, "ieee", 4, 2)}
#: Kind, input, output channels, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "plain": ((2, 18, 4, 5), 17, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": ((2, 3, 7, 7), 5, (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "dilated groups": ((1, 4, 5, 4), 6, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "1d": ((2, 7, 11), 4, (5,), (2,), (2,), (1,), 1),
    "3d": ((1, 3, 4, 5, 3), 4, (2, 3, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "one": ((1, 1, 1), 1, (1,), (1,), (0,), (1,), 1),
}


class Case(NamedTuple):
    """One call of a launcher.

    Attributes:
        name: Kernel, path and shape.
        inputs: Its tensors, which no kernel may write.
        call: Runs it on them.
        quick: Whether every test run takes it.
    """

    name: str
    inputs: Sequence[Tensor]
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    quick: bool = False


def made(*shape: int, pad: int = 0, seed: int = 0) -> Tensor:
    """Return normal numbers, rows ``pad`` elements further apart than they are long."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    first, *rest = numbers.stride()
    return torch.empty_strided(shape, (first + pad, *rest)).copy_(numbers)


def pinned(function: Callable[..., Any], *arguments: object, **configs: object) -> Callable[[], Any]:
    """Return a call under configurations."""

    def configured() -> Any:
        with compile_cases.configured(**configs):
            return function(*arguments)

    return configured


def cases(make: Callable[..., Tensor] = made) -> Iterator[Case]:
    """Return all of them, on tensors that ``make`` makes; `Case.quick` marks one for each path of each kernel."""
    yield from _contrasts(make)
    yield from _targets(make)
    yield from _heads(make)
    yield from _layers(make)


def _contrasts(make: Callable[..., Tensor]) -> Iterator[Case]:
    for (path, config), loss, ((B, N, D), pad) in itertools.product(
        CONTRAST.items(), LOSSES, (((5, 37, 19), 3), ((3, 64, 16), 0), ((1, 1, 1), 0), ((2, 33, 1), 1))
    ):
        h, z = make(B, D, pad=pad), make(B, N, pad=pad, seed=1)
        log = loss in ("bce", "brier")
        call = pinned(contrast.contrast_sqnorm, h, z, loss, True, log, False, contrast=config)
        yield Case(f"contrast {path} {loss} B={B} N={N} D={D}", (h, z), call, loss == "brier" and B == 5)


def _targets(make: Callable[..., Tensor]) -> Iterator[Case]:
    quick = (("indices", "bce"), ("soft", "brier"), ("ones", "cross_entropy"))
    for kind, loss, ((B, N, D), pad) in itertools.product(
        target.KINDS, LOSSES, (((5, 37, 19), 3), ((2, 16, 16), 0), ((1, 1, 1), 0))
    ):
        h, z = make(B, D, pad=pad), make(B, N, pad=pad, seed=1)
        y = {"indices": torch.arange(B) % N, "soft": make(B, N, pad=pad, seed=2)}.get(kind)
        config = TargetConfig(rows=2, block_n=16, block_d=16, num_warps=1)
        call = pinned(target.target_sqnorm, h, z, y, kind, loss, True, False, False, target=config)
        inputs = [t for t in (h, z, y) if t is not None]
        yield Case(f"target {kind} {loss} B={B} N={N} D={D}", inputs, call, (kind, loss) in quick and B == 5)


def _heads(make: Callable[..., Tensor]) -> Iterator[Case]:
    for loss, ((B, N, D), pad) in itertools.product(
        LOSSES, (((35, 37, 21), 3), ((16, 16, 16), 0), ((1, 1, 1), 0), ((17, 33, 5), 1))
    ):
        x, w, b = make(B, D, pad=pad), make(N, D, pad=pad, seed=1), make(N, seed=2)
        size = f"{loss} B={B} N={N} D={D}"
        for path, config in HEADS.items():
            bias = None if path == "launch" else b
            arguments = (x, w, bias, loss, False, True)
            call = pinned(linear_contrast.linear_contrast_sqnorm, *arguments, linear_contrast=config)
            yield Case(f"head {path} {size}", (x, w, b), call, loss == "cross_entropy" and B == 17)
        split = dataclasses.replace(HEAD, tiles_per_split=1)
        call = pinned(linear_contrast.linear_contrast_stats, x, w, b, loss, False, linear_stats=split)
        yield Case(f"statistics {size}", (x, w, b), call, loss == "brier" and B == 17)


def _layers(make: Callable[..., Tensor]) -> Iterator[Case]:
    for name, (shape, outputs, *each) in CONVOLUTIONS.items():
        sizes = zip(shape[2:], *each[:4], strict=True)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        a, g = make(*shape, pad=3), make(2, shape[0], outputs, *out, pad=5, seed=1)
        call = pinned(layer_sqnorm.conv_sqnorm, a, g, *each, **LAYERS)
        yield Case(f"convolution {name}", (a, g), call, name in ("strided", "dilated groups"))
    for gram, positions in itertools.product((False, True), (1, 16, 37)):
        a, g = make(3, positions, 20, pad=3), make(2, 3, positions, 17, pad=5, seed=1)
        call = pinned(layer_sqnorm.linear_sqnorm, a, g, layer_prefers_gram=gram, **LAYERS)
        yield Case(f"linear {'gram' if gram else 'direct'} T={positions}", (a, g), call, positions == 37)


def _spread(*shape: int, pad: int = 0, seed: int = 0) -> Tensor:
    """Return a tensor without memory, whose neighbours along every axis lie more than 2^31 elements apart."""
    strides = [(1 << 31) + 16 * (axis + 1) for axis in range(len(shape))]
    return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")


def huge() -> Iterator[tuple[str, Callable[[], object], int]]:
    """Return name, call on meta tensors and the integer that lies in memory."""
    for case in cases(_spread):
        if case.quick:
            yield f"{case.name}, strides beyond 2^31", case.call, 1

    loss, meta = "brier", partial(compile_cases.meta, dtype=torch.bfloat16)
    split = ContrastConfig("split", block_n=1 << 17, block_d=2048, splits=8, num_warps=16)
    for name, (B, N, D), configs in (
        ("rows", (4_300_000, 1000, 512), {}),
        ("stream", (120_000, 40_000, 64), {}),
        ("split", (3_000, 1_500_001, 64), {"contrast": split}),
    ):
        arguments = (meta(B, D), meta(B, N), loss, True, False, False)
        yield f"contrast {name} B={B} N={N} D={D}", pinned(contrast.contrast_sqnorm, *arguments, **configs), 1
    for kind, B, N in (("soft", 4_300_000, 1000), ("indices", 120_000, 40_000), ("ones", 120_000, 40_000)):
        y = {"indices": compile_cases.meta(B, dtype=torch.int64), "soft": meta(B, N)}.get(kind)
        arguments = (meta(B, 16), meta(B, N), y, kind, loss, True, False, False)
        yield f"target {kind} B={B} N={N}", pinned(target.target_sqnorm, *arguments), N - 1
    for B, N, D in ((200_000, 32_000, 64), (9_000_000, 1000, 320)):
        arguments = (meta(B, D), meta(N, D), meta(N), loss, False, False)
        yield f"head B={B} N={N} D={D}", pinned(linear_contrast.linear_contrast_sqnorm, *arguments), 1
    # Few tiles a program, so that the partial moments alone have more than 2^31 elements.
    tiles = dataclasses.replace(HEAD, block_m=128, block_n=128, block_k=64, parts=16, tiles_per_split=4)
    narrow = dataclasses.replace(tiles, block_m=16, block_n=1 << 13, tiles_per_split=1)
    for (B, N, D), config in (((1_500_000, 65_536, 64), tiles), ((3, 9_000_000, 320), narrow)):
        arguments = (meta(B, D), meta(N, D), meta(N), loss, False)
        call = pinned(linear_contrast.linear_contrast_stats, *arguments, linear_stats=config)
        yield f"statistics B={B} N={N} D={D}", call, 1
    image, each = meta(70_000, 64, 32, 32), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    yield "convolution of 4e9 elements", pinned(layer_sqnorm.conv_sqnorm, image, image[None], *each), 1
    for kind in ("direct", "gram"):
        arguments = (meta(70_000, 64, 1024), meta(1, 70_000, 64, 1024))
        call = pinned(layer_sqnorm.linear_sqnorm, *arguments, layer_prefers_gram=kind == "gram")
        yield f"linear {kind} of 4e9 elements", call, 1
