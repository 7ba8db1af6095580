"""The last layer: squared gradient norms of all contrasts, of one target, and the layer fused with them.

``contrasts``: features and logits in, ``(B, N)`` out. ``uniform target``: one norm a sample, the task of GradNorm.
``head``: features and weights in, logits and ``(B, N)`` out. ``statistics``: the same, five numbers a sample out.

Errors allowed, relative to float64: 1e-5 for fastgrad, 1e-3 for the peers, whose float32 autograd loses digits where
a probability is near one; 64 units of the dtype, relative to the largest entry, for logits and other plain products.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.micro import last_layer_peers as peers
from bench.micro.last_layer_inputs import Head
from bench.registry import Implementation, Place, case, forms, relative_error, scaled_error

OURS, PEERS = 1e-5, 1e-3
#: Contrasts times samples up to which the slow peers take part: a call of theirs takes seconds beyond.
SLOW = 2_000
FORMS = ("fastgrad Triton", "fastgrad eager")
TITLE = " B={0} N={1} D={2} {3}"

F32, HALF = ("float32",), ("bfloat16",)
TINY = [(3, 5, 8), (2, 33, 16)]
QUICK = [(64, 10, 512), (1, 1000, 512), (256, 1000, 512)]
FULL = [
    (1, 10, 512), (64, 10, 512), (4096, 10, 512), (1, 1000, 512), (8, 1000, 512), (32, 1000, 512), (256, 1000, 512),
    (4096, 1000, 512), (1, 32000, 768), (32, 32000, 768), (256, 32000, 768), (1, 128256, 1024), (8, 128256, 1024),
]  # fmt: skip
LARGEST = (1024, 128256, 4096)


def _at(shapes: list[tuple[int, int, int]], dtype: tuple[str] = F32) -> list[tuple[Any, ...]]:
    return [(*shape, *dtype) for shape in shapes]


@case(
    "last-layer", "contrasts" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.softmax", "closed form, textbook", "closed form, torch.compile", "vmap(grad)",
           "autograd loop"),
    tiny=_at(TINY), quick=_at(QUICK),
    full=[*_at(FULL), (256, 1000, 512, "float16"), (256, 1000, 512, "bfloat16")],
    gpu=[*_at([(4096, 32000, 4096), (256, 1000, 2048)], HALF), (8, 1000, 512, "float32")],
)  # fmt: skip
def contrasts(place: Place, B: int, N: int, D: int, dtype: str) -> Iterator[Implementation]:
    """Squared norms of all contrasts, from features and logits; peers that differentiate start from the features."""
    head_ = Head((B, N, D), dtype, place)
    h, z, check = head_.h, head_.z, head_.error
    yield from forms(lambda impl: fastgrad.contrast_sqnorm(h, z, impl=impl), check, OURS, place)
    yield _softmax(z)
    yield Implementation("closed form, textbook", lambda: lambda: peers.textbook(h, z), check, PEERS)
    compiled = partial(peers.compiled, peers.textbook, h, z)
    yield Implementation("closed form, torch.compile", compiled, check, PEERS)
    if B * N <= SLOW and (dtype == "float32" or place.device == "cuda"):
        tolerance = PEERS if dtype == "float32" else 1.0
        yield Implementation("vmap(grad)", partial(peers.vmap, head_), check, tolerance, graph=False)
        yield Implementation("autograd loop", partial(peers.loop, head_), check, tolerance, graph=False)


@case(
    "last-layer", "head" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form", "the same, torch.compile", "Liger fused linear loss",
           "Cut Cross-Entropy"),
    tiny=_at(TINY), quick=_at(QUICK), full=_at(FULL),
    gpu=_at([(1024, 32000, 4096), *((B, 1000, 2048) for B in (1, 8, 32, 256))], HALF),
)  # fmt: skip
def head(place: Place, B: int, N: int, D: int, dtype: str) -> Iterator[Implementation]:
    """The layer and all contrasts; norms are judged for the logits each implementation returned."""
    head_ = Head((B, N, D), dtype, place)
    h, weight, bias = head_.h, head_.weight, head_.bias
    product = F.linear(h.double(), weight.double(), bias.double())

    def check(out: tuple[Tensor, Tensor]) -> float:
        logits, norms = out
        if scaled_error(logits, product) > _unit(h):
            return float("inf")
        return relative_error(norms, head_.norms(logits))

    def unfused(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, bias)
        return z, peers.textbook(h, z)

    yield from forms(
        lambda impl: fastgrad.linear_contrast_sqnorm(h, weight, bias, impl=impl), check, OURS, place
    )
    yield _linear(head_, product)
    yield Implementation(
        "linear, softmax, closed form", lambda: lambda: unfused(h, weight, bias), check, PEERS
    )
    compiled = partial(peers.compiled, unfused, h, weight, bias)
    yield Implementation("the same, torch.compile", compiled, check, PEERS)
    if place.device == "cuda":
        yield from peers.neighbours(head_, product)


@case(
    "last-layer", "uniform target" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.softmax", "GradNorm, as OpenOOD", "GradNorm, pytorch-ood"),
    tiny=_at(TINY), quick=_at(QUICK[:1]), full=_at([s for s in FULL if s[0] > 1]), gpu=_at([(64, 1000, 2048)], HALF),
)  # fmt: skip
def uniform(place: Place, B: int, N: int, D: int, dtype: str) -> Iterator[Implementation]:
    """One norm a sample under the uniform target; GradNorm's own norm is L1 and is checked as such."""
    head_ = Head((B, N, D), dtype, place)
    h, z = head_.h, head_.z
    delta = z.double().softmax(-1) - 1 / N
    squared = delta.square().sum(-1) * head_.factor().squeeze(-1)
    absolute = delta.abs().sum(-1) * h.double().abs().sum(-1)

    def check(out: Tensor) -> float:
        return relative_error(out, squared)

    yield from forms(lambda impl: fastgrad.target_sqnorm(h, z, "uniform", impl=impl), check, OURS, place)
    yield _softmax(z)
    tolerance = PEERS if dtype == "float32" else 0.1
    # OpenOOD's confidence is the norm itself; pytorch-ood's score, higher for outliers, is minus the norm.
    for name, peer, limit, sign in (
        ("GradNorm, as OpenOOD", peers.openood, 64, 1), ("GradNorm, pytorch-ood", peers.pytorch_ood, 256, -1),
    ):  # fmt: skip
        if limit >= B:
            yield Implementation(
                name, partial(peer, head_), lambda out, sign=sign: relative_error(sign * out, absolute),  # type: ignore[misc]
                tolerance, graph=False,
            )  # fmt: skip


@case(
    "last-layer", "statistics" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form"),
    tiny=_at(TINY[-1:]), quick=_at(QUICK[-1:]), full=_at(FULL[-1:]), gpu=_at([LARGEST], HALF),
)  # fmt: skip
def statistics(place: Place, B: int, N: int, D: int, dtype: str) -> Iterator[Implementation]:
    """Minimum, maximum, mean, expectation and predicted contrast, without the matrix."""
    head_ = Head((B, N, D), dtype, place)
    h, weight, bias = head_.h, head_.weight, head_.bias
    z = F.linear(h.double(), weight.double(), bias.double())

    def summed(norms: Tensor, z: Tensor) -> Tensor:
        top = norms.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
        expected = (z.softmax(-1) * norms).sum(-1)
        return torch.stack([norms.amin(-1), norms.amax(-1), norms.mean(-1), expected, top], -1)

    wanted = summed(head_.norms(z), z)
    # The norms follow the logits, whose products round by units of the dtype.
    tolerance = _unit(h) * float(z.abs().max())

    def unfused() -> Tensor:
        z = F.linear(h, weight, bias)
        return summed(peers.textbook(h, z), z.float())

    def check(out: Any) -> float:
        return relative_error(torch.stack(list(out), -1) if isinstance(out, tuple) else out, wanted)

    yield from forms(
        lambda impl: fastgrad.linear_contrast_stats(h, weight, bias, impl=impl), check, tolerance, place
    )
    yield _linear(head_, z)
    yield Implementation("linear, softmax, closed form", lambda: unfused, check, max(PEERS, tolerance))


def _softmax(z: Tensor) -> Implementation:
    def check(out: Tensor) -> float:
        return scaled_error(out, z.double().softmax(-1))

    return Implementation("torch.softmax", lambda: lambda: torch.softmax(z, -1), check, _unit(z))


def _linear(head_: Head, product: Tensor) -> Implementation:
    def alone() -> Tensor:
        return F.linear(head_.h, head_.weight, head_.bias)

    return Implementation(
        "linear alone", lambda: alone, lambda out: scaled_error(out, product), _unit(head_.h)
    )


def _unit(values: Tensor) -> float:
    """What a plain product may lose, relative to its largest entry."""
    return 64 * torch.finfo(values.dtype).eps
