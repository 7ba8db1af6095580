"""Reductions every rule shares; sums run in float32 at least."""

from __future__ import annotations

from torch import Tensor, nn

from fastgrad.losses import compute_dtype


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype in which their sums run (no copy where they have it already)."""
    dtype = compute_dtype(*(t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sqnorm(x: Tensor) -> Tensor:
    """Squared L2 norm over everything but dimension 0: ``(B, ...) -> (B,)``."""
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return flat.square().sum(1)


def positions_first(x: Tensor, trailing: int) -> Tensor:
    """Flatten what stands between the batch and the last ``trailing`` dimensions: ``(B, T, *trailing)``; T may be 1."""
    keep = x.dim() - trailing
    return x.unsqueeze(1) if keep == 1 else x.flatten(1, keep - 1)


def leaf(x: Tensor) -> Tensor:
    """A leaf with the values of ``x`` that requires gradients; also under ``vmap``, which forbids requires_grad_."""
    return nn.Parameter(x.detach())
