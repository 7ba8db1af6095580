"""Every kernel on every path, with shapes that leave blocks incomplete, single or empty.

To add a kernel, add its calls to `cases`, and to `huge` shapes that give each operand more than 2^31 elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.compile_cases import Call, Case, Make, configured, meta, prepared, tensors
from fastgrad.losses import LOSSES, TARGETS
from fastgrad.ops.triton import contrasts, layer_sqnorm
from fastgrad.ops.tune import cdiv

SMALL = {"BLOCK_D": 16, "num_warps": 1}


def tiled(block: int) -> Any:
    """Return a function as `tune.last_layer` by which programs share every row, with tiles of ``block`` logits."""
    return lambda B, N, *_: ({**SMALL, "BLOCK_N": block}, cdiv(N, block))


#: Both ways to a row's norms, with more rows and features than fit a block, and tiles shorter than a row.
PATHS = {"rows": ({**SMALL, "ROWS": 4, "BLOCK_N": 64}, 0), "tiles": tiled(32)}
OF_LAYERS = {"BLOCK_T": 16, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
LAYERS = {
    "layer_direct": {"BLOCK_O": 16, "BLOCK_C": 16, **OF_LAYERS},
    "layer_gram": {"BLOCK_K": 16, **OF_LAYERS},
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


def made(*shape: int, pad: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return normal numbers, rows ``pad`` elements further apart than they are long."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    numbers = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    first, *rest = numbers.stride()
    return numbers.new_empty_strided(shape, (first + pad if rest else first, *rest)).copy_(numbers)


def _case(title: str, loss: str, sizes: tuple[int, ...], call: partial[Any], quick: bool, **configs: object) -> Case:
    name = "{} {} B={} N={} D={}".format(title, loss, *sizes)
    return Case(name, tensors(call), configured(**configs)(call), quick)


def cases(make: Make = made) -> Iterator[Case]:
    """Yield all cases; `Case.quick` marks one for each path of each kernel."""
    # Rows with space between them, tiles that begin before their rows, a single number, whole blocks.
    some, peeled, ones = ((5, 37, 19), 3), ((3, 37, 16), 0), ((1, 1, 1), 0)
    shapes = (some, peeled, ones, ((2, 64, 16), 0))
    for (path, config), loss, (sizes, pad) in itertools.product(PATHS.items(), LOSSES, shapes):
        made_here = partial(make, pad=pad)
        for log in (False, True):
            call = prepared(contrasts.contrast_sqnorm, made_here, *sizes, loss, log=log)
            quick = (loss, log) in (("cross_entropy", False), ("brier", True)) and sizes == peeled[0]
            yield _case(f"contrast {path}{' log' if log else ''}", loss, sizes, call, quick, last_layer=config)
        call = prepared(contrasts.contrast_stats, made_here, *sizes, loss)
        yield _case(f"statistics {path}", loss, sizes, call, loss == "bce" and sizes == some[0], last_layer=config)
    few = (("indices", "bce"), ("ones", "cross_entropy"))
    for (path, config), kind, loss, (sizes, pad) in itertools.product(
        PATHS.items(), (*TARGETS, "indices"), LOSSES, (some, peeled, ones)
    ):
        call = prepared(contrasts.target_sqnorm, partial(make, pad=pad), *sizes, loss, kind=kind)
        quick = (kind, loss) in few and sizes == some[0]
        yield _case(f"target {kind} {path}", loss, sizes, call, quick, last_layer=config)

    for name, (shape, outputs, *each) in CONVOLUTIONS.items():
        along = zip(shape[2:], *each[:4], strict=True)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along]
        a, g = make(*shape, pad=3), make(2, shape[0], outputs, *out, pad=5, seed=1)
        call = configured(**LAYERS)(partial(layer_sqnorm.conv_sqnorm, a, g, *each))
        yield Case(f"convolution {name}", (a, g), call, name in ("strided", "dilated groups"))
    for gram, positions in itertools.product((False, True), (1, 16, 37)):
        a, g = make(3, positions, 20, pad=3), make(2, 3, positions, 17, pad=5, seed=1)
        call = configured(layer_prefers_gram=gram, **LAYERS)(partial(layer_sqnorm.linear_sqnorm, a, g))
        yield Case(f"linear {'gram' if gram else 'direct'} T={positions}", (a, g), call, positions == 37)


def _spread(*shape: int, pad: int = 0, seed: int = 0) -> Tensor:
    """Return a tensor without memory, whose neighbours along every axis lie more than 2^31 elements apart."""
    strides = [(1 << 31) + 16 * (axis + 1) for axis in range(len(shape))]
    return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")


def huge() -> Iterator[tuple[str, Call, int]]:
    """Yield name, call on meta tensors, and the integer that every read returns."""
    for case in cases(_spread):
        if case.quick:
            yield f"{case.name}, strides beyond 2^31", case.call, 1

    of = partial(meta, dtype=torch.bfloat16)
    # The partial moments alone have more than 2^31 elements in the last.
    norms, statistics = contrasts.contrast_sqnorm, contrasts.contrast_stats
    for title, launcher, sizes, loss, configs in (
        ("contrast rows", norms, (4_300_000, 1000, 512), "cross_entropy", {}),
        ("general rows", norms, (4_300_000, 1000, 512), "brier", {}),
        ("contrast tiles", norms, (120_000, 40_000, 64), "brier", {}),
        ("peeled tiles", norms, (3_000, 1_500_001, 64), "brier", {}),
        ("statistics", statistics, (1_500_000, 65_536, 64), "bce", {}),
        ("statistics", statistics, (1_500_000, 65_536, 64), "bce", {"last_layer": tiled(128)}),
    ):
        case = _case(title, loss, sizes, prepared(launcher, of, *sizes, loss), False, **configs)
        yield case.name, case.call, 1
    for kind, B, N in (("indices", 120_000, 40_000), ("ones", 120_000, 40_000), ("uniform", 4_300_000, 1000)):
        yield f"target {kind} B={B} N={N}", prepared(contrasts.target_sqnorm, of, B, N, 16, "bce", kind=kind), N - 1
    image, each = of(70_000, 64, 32, 32), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    yield "convolution of 4e9 elements", partial(layer_sqnorm.conv_sqnorm, image, image[None], *each), 1
    for kind in ("direct", "gram"):
        call = partial(layer_sqnorm.linear_sqnorm, of(70_000, 64, 1024), of(1, 70_000, 64, 1024))
        yield f"linear {kind} of 4e9 elements", configured(layer_prefers_gram=kind == "gram")(call), 1
