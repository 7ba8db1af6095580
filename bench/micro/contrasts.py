"""The last layer: squared gradient norms of all contrasts, of one target, and the layer fused with them.

Errors allowed, relative to float64: 1e-5 for fastgrad, those of `contrast_peers` for the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.micro import contrast_peers as peers
from bench.micro.contrast_peers import Head, factor, textbook
from bench.registry import Implementation, case, relative_error, scaled_error

OURS, PEERS = 1e-5, 1e-3
FORMS = ("fastgrad Triton", "fastgrad eager")
TITLE = " B={0} N={1} D={2} {3}"
TINY = [(3, 5, 8), (2, 33, 16)]
QUICK = [(64, 10, 512), (1, 1000, 512), (256, 1000, 512)]
FULL = [
    (1, 10, 512), (64, 10, 512), (256, 10, 512), (4096, 10, 512), (1, 1000, 512), (8, 1000, 512), (32, 1000, 512),
    (256, 1000, 512), (4096, 1000, 512), (1, 32000, 768), (32, 32000, 768), (256, 32000, 768), (1, 128256, 1024),
    (8, 128256, 1024),
]  # fmt: skip


def _at(shapes: list[tuple[int, int, int]], dtype: str = "float32") -> list[tuple[Any, ...]]:
    return [(*shape, dtype) for shape in shapes]


def _forms(
    call: Callable[..., Any], check: Callable[[Any], float], tolerance: float, device: str
) -> Iterator[Implementation]:
    """Yield the eager form of an operator and, on a GPU, its kernels; ``call`` takes the operator's ``impl``."""
    for impl, name in zip(("triton", "eager"), FORMS, strict=True):
        if impl == "eager" or device == "cuda":
            yield Implementation(name, lambda impl=impl: partial(call, impl=impl), check, tolerance)  # type: ignore[misc]


def _softmax(head_: Head) -> Implementation:
    check = partial(scaled_error, reference=head_.z.double().softmax(-1))
    return Implementation("torch.softmax", lambda: partial(torch.softmax, head_.z, -1), check, head_.unit)


def _linear(head_: Head) -> Implementation:
    check = partial(scaled_error, reference=head_.exact)
    return Implementation("linear alone", lambda: partial(F.linear, *head_.layer), check, head_.unit)


@case(
    "last-layer", "contrasts" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.compile of fastgrad", "torch.softmax", "closed form, textbook", "closed form, torch.compile",
           "exact form, torch.compile", "vmap(grad)", "autograd loop"),
    tiny=_at(TINY), quick=_at(QUICK),
    full=[*_at(FULL), (256, 1000, 512, "float16"), (256, 1000, 512, "bfloat16")],
    gpu=[*_at([(4096, 32000, 4096), (256, 1000, 2048)], "bfloat16"), (8, 1000, 512, "float32")],
)  # fmt: skip
def contrasts(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """Squared norms of all contrasts, from features and logits; peers that differentiate start from the features."""
    head_ = Head(B, N, D, dtype, device)
    h, z = head_.h, head_.z

    def check(norms: Tensor) -> float:
        return relative_error(norms, head_.norms(z))

    yield from _forms(partial(fastgrad.contrast_sqnorm, h, z), check, OURS, device)
    # On a GPU, the operator in a compiled function is the kernel.
    if device == "cpu":
        whole = partial(peers.compiled, lambda h, z: fastgrad.contrast_sqnorm(h, z), h, z)
        yield Implementation("torch.compile of fastgrad", whole, check, OURS)
    yield _softmax(head_)
    yield Implementation("closed form, textbook", lambda: partial(textbook, h, z), check, PEERS)
    yield Implementation("closed form, torch.compile", partial(peers.compiled, textbook, h, z), check, PEERS)
    yield Implementation("exact form, torch.compile", partial(peers.compiled, peers.formula, h, z), check, OURS)
    # Above this size, a call of these two takes seconds.
    if B * N <= 2_000:
        yield Implementation("vmap(grad)", partial(peers.vmap, head_), check, PEERS, graph=False)
        yield Implementation("autograd loop", partial(peers.loop, head_), check, PEERS, graph=False)


@case(
    "last-layer", "head" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form", "the same, torch.compile"),
    tiny=_at(TINY), quick=_at(QUICK), full=_at(FULL),
    gpu=_at([(1024, 32000, 4096), *((B, 1000, 2048) for B in (1, 8, 32, 256))], "bfloat16"),
)  # fmt: skip
def head(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """The layer and all contrasts; norms are judged for the logits each implementation returned."""
    head_ = Head(B, N, D, dtype, device)

    def check(out: tuple[Tensor, Tensor]) -> float:
        logits, norms = out
        if scaled_error(logits, head_.exact) > head_.unit:
            return float("inf")
        return relative_error(norms, head_.norms(logits))

    def unfused(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, bias)
        return z, textbook(h, z)

    layer = head_.layer
    yield from _forms(partial(fastgrad.linear_contrast_sqnorm, *layer), check, OURS, device)
    yield _linear(head_)
    yield Implementation("linear, softmax, closed form", lambda: partial(unfused, *layer), check, PEERS)
    yield Implementation("the same, torch.compile", partial(peers.compiled, unfused, *layer), check, PEERS)


@case(
    "last-layer", "uniform target" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.softmax", "GradNorm, as OpenOOD", "GradNorm, pytorch-ood"),
    tiny=_at(TINY), quick=_at(QUICK[:1]), full=_at([s for s in FULL if s[0] > 1]),
    gpu=_at([(64, 1000, 2048)], "bfloat16"),
)  # fmt: skip
def uniform(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """One norm per sample for the uniform target; GradNorm's own norm is L1 and is checked as such."""
    head_ = Head(B, N, D, dtype, device)
    h, z = head_.h, head_.z
    delta = z.double().softmax(-1) - 1 / N
    check = partial(relative_error, reference=delta.square().sum(-1) * factor(h, torch.float64)[:, 0])
    yield from _forms(partial(fastgrad.target_sqnorm, h, z, "uniform"), check, OURS, device)
    yield _softmax(head_)
    absolute = delta.abs().sum(-1) * h.double().abs().sum(-1)
    tolerance = PEERS if dtype == "float32" else 0.1
    # OpenOOD's confidence is the norm itself; pytorch-ood's score, higher for outliers, is minus the norm. pytorch-ood
    # stores every sample's gradient: 8 GiB of them at most.
    for name, peer, limit, reference in (
        ("GradNorm, as OpenOOD", peers.openood, 64, absolute),
        ("GradNorm, pytorch-ood", peers.pytorch_ood, min(256, 2**31 // (N * D)), -absolute),
    ):
        if limit >= B:
            check = partial(relative_error, reference=reference)
            yield Implementation(name, partial(peer, head_), check, tolerance, graph=False)


@case(
    "last-layer", "statistics" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form", "loss alone, Liger",
           "loss alone, Cut Cross-Entropy"),
    tiny=_at(TINY[-1:]), quick=_at(QUICK[-1:]), full=_at(FULL[-1:]), gpu=_at([(1024, 128256, 4096)], "bfloat16"),
)  # fmt: skip
def statistics(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """Minimum, maximum, mean, expectation and predicted contrast, without the matrix."""
    head_ = Head(B, N, D, dtype, device)

    def summed(norms: Tensor, z: Tensor) -> Tensor:
        top = norms.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
        expected = (z.softmax(-1) * norms).sum(-1)
        return torch.stack([norms.amin(-1), norms.amax(-1), norms.mean(-1), expected, top], -1)

    wanted = summed(head_.norms(head_.exact), head_.exact)
    # The norms follow the logits, whose products round by units of the dtype.
    tolerance = head_.unit * float(head_.exact.abs().max())

    def unfused() -> Tensor:
        z = F.linear(*head_.layer)
        return summed(textbook(head_.h, z), z.float())

    def check(out: Any) -> float:
        return relative_error(torch.stack(list(out), -1) if isinstance(out, tuple) else out, wanted)

    yield from _forms(partial(fastgrad.linear_contrast_stats, *head_.layer), check, tolerance, device)
    yield _linear(head_)
    yield Implementation("linear, softmax, closed form", lambda: unfused, check, max(PEERS, tolerance))
    yield from peers.loss_alone(head_, device)
