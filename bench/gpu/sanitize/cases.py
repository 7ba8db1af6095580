"""Every kernel on every path, with shapes that leave blocks incomplete, single or empty.

To add a kernel, add its calls to `cases`, and to `huge` shapes of more than 2^31 elements in each of its operands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.gpu.sanitize.memory import guarded
from fastgrad.losses import LOSSES
from fastgrad.ops import tune
from fastgrad.ops.triton import contrast, layer_sqnorm, linear_contrast, target
from fastgrad.ops.tune import (
    ContrastConfig,
    DirectConfig,
    GramConfig,
    LinearConfig,
    TargetConfig,
)

HEAD = LinearConfig(
    block_m=16, block_n=16, block_k=16, group_m=2, chunks=0, block_f=16, parts=2, tiles_per_split=2,
    norm_in_loop=False, precision="ieee", num_warps=4, num_stages=2,
)  # fmt: skip
CONTRAST = {
    "rows": ContrastConfig("rows", block_n=64, block_d=16, rows=4),
    "stream": ContrastConfig("stream", block_n=32, block_d=16),
    "split": ContrastConfig("split", block_n=32, block_d=16, splits=2),
}
HEADS = {
    "last": HEAD,
    "last, norm in loop": dataclasses.replace(HEAD, norm_in_loop=True, group_m=1),
    "launch": dataclasses.replace(HEAD, chunks=2),
}
LAYERS = {
    "layer_direct": DirectConfig(16, 16, 16, "ieee", 4, 2),
    "layer_gram": GramConfig(16, 16, "ieee", 4, 2),
}
#: Kind, input, output channels, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "plain": ((2, 18, 4, 5), 17, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": ((2, 3, 7, 7), 5, (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "dilated groups": ((1, 4, 5, 4), 6, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "1d": ((2, 7, 11), 4, (5,), (2,), (2,), (1,), 1),
    "3d": ((1, 3, 4, 5, 3), 4, (2, 3, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "one": ((1, 1, 1), 1, (1,), (1,), (0,), (1,), 1),
}


Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: Kernel, path and shape.
        inputs: Its tensors, between poisoned margins.
        call: Runs it on them.
        quick: Whether every test run takes it.
    """

    name: str
    inputs: Sequence[Tensor]
    call: Call
    quick: bool = False


def made(*shape: int, pad: int = 0, seed: int = 0) -> Tensor:
    """Normal numbers, rows ``pad`` elements further apart than they are long, between poisoned margins."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return guarded(torch.randn(shape, generator=generator), pad)


def pinned(
    call: Callable[[], Tensor | tuple[Tensor, ...]], **configs: object
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    def configured() -> Tensor | tuple[Tensor, ...]:
        with tune.override(**configs):
            return call()

    return configured


def cases() -> Iterator[Case]:
    """All of them; `Case.quick` marks one for each path of each kernel."""
    yield from _contrasts()
    yield from _targets()
    yield from _heads()
    yield from _layers()


def _contrasts() -> Iterator[Case]:
    for (path, config), loss, ((B, N, D), pad) in itertools.product(
        CONTRAST.items(), LOSSES, (((5, 37, 19), 3), ((3, 64, 16), 0), ((1, 1, 1), 0), ((2, 33, 1), 1))
    ):
        h, z = made(B, D, pad=pad), made(B, N, pad=pad, seed=1)
        log = loss in ("bce", "brier")
        yield Case(
            f"contrast {path} {loss} B={B} N={N} D={D}", (h, z),
            pinned(
                lambda h=h, z=z, loss=loss, log=log: contrast.contrast_sqnorm(h, z, loss, True, log, False),
                contrast=config,
            ),
            quick=loss == "brier" and B == 5,
        )  # fmt: skip


def _targets() -> Iterator[Case]:
    for kind, loss, ((B, N, D), pad) in itertools.product(
        target.KINDS, LOSSES, (((5, 37, 19), 3), ((2, 16, 16), 0), ((1, 1, 1), 0))
    ):
        h, z = made(B, D, pad=pad), made(B, N, pad=pad, seed=1)
        y = {"indices": guarded(torch.arange(B) % N), "soft": made(B, N, pad=pad, seed=2)}.get(kind)
        yield Case(
            f"target {kind} {loss} B={B} N={N} D={D}", [t for t in (h, z, y) if t is not None],
            pinned(
                partial(target.target_sqnorm, h, z, y, kind, loss, True, False, False),
                target=TargetConfig(rows=2, block_n=16, block_d=16, num_warps=1),
            ),
            quick=(kind, loss) in (("indices", "bce"), ("soft", "brier"), ("ones", "cross_entropy")) and B == 5,
        )  # fmt: skip


def _heads() -> Iterator[Case]:
    for loss, ((B, N, D), pad) in itertools.product(
        LOSSES, (((35, 37, 21), 3), ((16, 16, 16), 0), ((1, 1, 1), 0), ((17, 33, 5), 1))
    ):
        x, w, b = made(B, D, pad=pad), made(N, D, pad=pad, seed=1), made(N, seed=2)
        for path, config in HEADS.items():
            bias = None if path == "launch" else b
            yield Case(
                f"head {path} {loss} B={B} N={N} D={D}", (x, w, b),
                pinned(
                    partial(linear_contrast.linear_contrast_sqnorm, x, w, bias, loss, False, True),
                    linear_contrast=config,
                ),
                quick=loss == "cross_entropy" and B == 17,
            )  # fmt: skip
        yield Case(
            f"statistics {loss} B={B} N={N} D={D}", (x, w, b),
            pinned(
                lambda x=x, w=w, b=b, loss=loss: linear_contrast.linear_contrast_stats(x, w, b, loss, False),
                linear_stats=dataclasses.replace(HEAD, tiles_per_split=1),
            ),
            quick=loss == "brier" and B == 17,
        )  # fmt: skip


def _layers() -> Iterator[Case]:
    for name, (shape, outputs, kernel, stride, padding, dilation, groups) in CONVOLUTIONS.items():
        sizes = zip(shape[2:], kernel, stride, padding, dilation, strict=True)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        a, g = made(*shape, pad=3), made(2, shape[0], outputs, *out, pad=5, seed=1)
        yield Case(
            f"convolution {name}", (a, g),
            pinned(
                partial(layer_sqnorm.conv_sqnorm, a, g, kernel, stride, padding, dilation, groups),
                **LAYERS,
            ),
            quick=name in ("strided", "dilated groups"),
        )  # fmt: skip
    for gram, positions in itertools.product((False, True), (1, 16, 37)):
        a, g = made(3, positions, 20, pad=3), made(2, 3, positions, 17, pad=5, seed=1)
        yield Case(
            f"linear {'gram' if gram else 'direct'} T={positions}", (a, g),
            pinned(lambda a=a, g=g: layer_sqnorm.linear_sqnorm(a, g), layer_prefers_gram=gram, **LAYERS),
            quick=positions == 37,
        )  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _spread(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Neighbours along every axis lie more than 2^31 elements apart."""
    strides = [(1 << 31) + 16 * (axis + 1) for axis in range(len(shape))]
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def huge() -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call on meta tensors and the integer that lies in memory."""
    loss = "brier"
    split = ContrastConfig("split", block_n=1 << 17, block_d=2048, splits=8, num_warps=16)
    for name, (B, N, D), configs in (
        ("rows", (4_300_000, 1000, 512), {}),
        ("stream", (120_000, 40_000, 64), {}),
        ("split", (3_000, 1_500_001, 64), {"contrast": split}),
    ):
        yield (
            f"contrast {name} B={B} N={N} D={D}",
            pinned(
                lambda B=B, N=N, D=D: contrast.contrast_sqnorm(
                    _meta(B, D), _meta(B, N), loss, True, False, False
                ),
                **configs,
            ), 1,
        )  # fmt: skip
    for kind in ("rows", "stream", "split"):
        yield (
            f"contrast {kind}, strides beyond 2^31",
            pinned(
                lambda: contrast.contrast_sqnorm(_spread(5, 19), _spread(5, 37), loss, True, True, False),
                contrast=CONTRAST[kind],
            ), 1,
        )  # fmt: skip
    for kind, B, N in (("soft", 4_300_000, 1000), ("indices", 120_000, 40_000), ("ones", 120_000, 40_000)):
        y = {"indices": _meta(B, dtype=torch.int64), "soft": _meta(B, N)}.get(kind)
        yield (
            f"target {kind} B={B} N={N}",
            lambda B=B, N=N, y=y, kind=kind: target.target_sqnorm(
                _meta(B, 16), _meta(B, N), y, kind, loss, True, False, False
            ),
            N - 1,
        )
    yield (
        "target soft, strides beyond 2^31",
        lambda: target.target_sqnorm(
            _spread(5, 19), _spread(5, 37), _spread(5, 37), "soft", loss, True, True, False
        ),
        1,
    )
    for B, N, D in ((200_000, 32_000, 64), (9_000_000, 1000, 320)):
        x, w, b = _meta(B, D), _meta(N, D), _meta(N)
        yield f"head B={B} N={N} D={D}", lambda x=x, w=w, b=b: linear_contrast.linear_contrast_sqnorm(
            x, w, b, loss, False, False
        ), 1  # fmt: skip
    # Few tiles a program, so that the partial moments alone have more than 2^31 elements.
    tiles = dataclasses.replace(HEAD, block_m=128, block_n=128, block_k=64, parts=16, tiles_per_split=4)
    for B, N, D in ((1_500_000, 65_536, 64), (3, 9_000_000, 320)):
        x, w, b = _meta(B, D), _meta(N, D), _meta(N)
        split = tiles if B > N else dataclasses.replace(tiles, block_m=16, block_n=1 << 13, tiles_per_split=1)
        yield (
            f"statistics B={B} N={N} D={D}",
            pinned(
                lambda x=x, w=w, b=b: linear_contrast.linear_contrast_stats(x, w, b, loss, False),
                linear_stats=split,
            ), 1,
        )  # fmt: skip
    for path, config in HEADS.items():
        yield (
            f"head {path}, strides beyond 2^31",
            pinned(
                lambda: linear_contrast.linear_contrast_sqnorm(
                    _spread(35, 21), _spread(37, 21), _meta(37), loss, False, False
                ),
                linear_contrast=config,
            ), 1,
        )  # fmt: skip
    each = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    yield (
        "convolution of 4e9 elements",
        lambda: layer_sqnorm.conv_sqnorm(_meta(70_000, 64, 32, 32), _meta(1, 70_000, 64, 32, 32), *each), 1,
    )  # fmt: skip
    yield (
        "convolution, strides beyond 2^31",
        lambda: layer_sqnorm.conv_sqnorm(_spread(2, 18, 4, 5), _spread(2, 2, 17, 4, 5), *each), 1,
    )  # fmt: skip
    for gram in (False, True):
        kind = "gram" if gram else "direct"
        yield (
            f"linear {kind} of 4e9 elements",
            pinned(
                lambda: layer_sqnorm.linear_sqnorm(_meta(70_000, 64, 1024), _meta(1, 70_000, 64, 1024)),
                layer_prefers_gram=gram,
            ), 1,
        )  # fmt: skip
        yield (
            f"linear {kind}, strides beyond 2^31",
            pinned(
                lambda: layer_sqnorm.linear_sqnorm(_spread(3, 37, 20), _spread(2, 3, 37, 17)),
                layer_prefers_gram=gram,
            ), 1,
        )  # fmt: skip
