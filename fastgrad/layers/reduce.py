"""Reductions that the rules share; sums are computed in float32 or float64."""

from __future__ import annotations

from torch import Tensor

from fastgrad.losses import compute_dtype


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype in which they are summed, without a copy if they have it already."""
    dtype = compute_dtype(*(t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sqnorm(x: Tensor) -> Tensor:
    """Return the squared L2 norm over everything but dimension 0: ``(B, ...) -> (B,)``."""
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return flat.square().sum(1)


def positions_first(x: Tensor, trailing: int) -> Tensor:
    """Flatten the dimensions between the batch and the last ``trailing`` ones: ``(B, T, *trailing)``; T may be 1."""
    keep = x.dim() - trailing
    return x.unsqueeze(1) if keep == 1 else x.flatten(1, keep - 1)
