"""The four tasks: each a list of implementations with the check that each must pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.harness.case import Implementation, relative_error, scaled_error
from bench.micro.last_layer import peers
from bench.micro.last_layer.head import Head, Shape
from bench.micro.ours import forms

OURS, PEERS = 1e-5, 1e-3
#: Contrasts times samples up to which the slow peers take part: a call of theirs takes seconds beyond.
LOOP_LIMIT, VMAP_LIMIT = 2_000, 2_000


def contrasts(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """Squared norms of all contrasts, from features and logits; peers that differentiate start from the features."""
    head_ = Head(shape, dtype, device, seed)
    h, z, check = head_.h, head_.z, head_.error
    found = [
        *forms(lambda impl: fastgrad.contrast_sqnorm(h, z, impl=impl), check, OURS, device),
        _softmax(z),
        Implementation("closed form, textbook", lambda: lambda: peers.textbook(h, z), check, PEERS),
        Implementation("closed form, torch.compile", lambda: peers.compiled(peers.textbook, h, z), check, PEERS),
    ]  # fmt: skip
    if dtype == torch.float32 or device == "cuda":
        tolerance = PEERS if dtype == torch.float32 else 1.0
        for name, peer, limit in (
            ("vmap(grad)", peers.vmap, VMAP_LIMIT), ("autograd loop", peers.loop, LOOP_LIMIT),
        ):  # fmt: skip
            if shape[0] * shape[1] <= limit:
                found.append(Implementation(name, partial(peer, head_), check, tolerance, graph=False))
    return found


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


def uniform(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """One norm a sample under the uniform target; GradNorm's own norm is L1 and is checked as such."""
    head_ = Head(shape, dtype, device, seed)
    h, z = head_.h, head_.z
    delta = z.double().softmax(-1) - 1 / shape[1]
    squared = delta.square().sum(-1) * head_.factor().squeeze(-1)
    absolute = delta.abs().sum(-1) * h.double().abs().sum(-1)

    def check(out: Tensor) -> float:
        return relative_error(out, squared)

    def check_l1(sign: int, out: Tensor) -> float:
        return relative_error(sign * out, absolute)

    found = [
        *forms(lambda impl: fastgrad.target_sqnorm(h, z, "uniform", impl=impl), check, OURS, device),
        _softmax(z),
    ]
    tolerance = PEERS if dtype == torch.float32 else 0.1
    # OpenOOD's confidence is the norm itself; pytorch-ood's score, higher for outliers, is minus the norm.
    for name, peer, limit, sign in (
        ("GradNorm, as OpenOOD", peers.openood, 64, 1), ("GradNorm, pytorch-ood", peers.pytorch_ood, 256, -1),
    ):  # fmt: skip
        if shape[0] <= limit:
            check_sign = partial(check_l1, sign)
            found.append(Implementation(name, partial(peer, head_), check_sign, tolerance, graph=False))
    return found


def head(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """The layer and all contrasts; norms are judged for the logits each implementation returned."""
    head_ = Head(shape, dtype, device, seed)
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

    return [
        *forms(lambda impl: fastgrad.linear_contrast_sqnorm(h, weight, bias, impl=impl), check, OURS, device),
        _linear(head_, product),
        Implementation("linear, softmax, closed form", lambda: lambda: unfused(h, weight, bias), check, PEERS),
        Implementation("the same, torch.compile", lambda: peers.compiled(unfused, h, weight, bias), check, PEERS),
        *(peers.neighbours(head_, product) if device == "cuda" else ()),
    ]  # fmt: skip


def statistics(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """Minimum, maximum, mean, expectation and predicted contrast, without the matrix."""
    head_ = Head(shape, dtype, device, seed)
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

    return [
        *forms(lambda impl: fastgrad.linear_contrast_stats(h, weight, bias, impl=impl), check, tolerance, device),
        _linear(head_, z),
        Implementation("linear, softmax, closed form", lambda: unfused, check, max(PEERS, tolerance)),
    ]  # fmt: skip
