"""Operations that ONNX lacks, composed of operators that it has.

`torch.export.ExportedProgram.run_decompositions` replaces ATen's operators by these before PyTorch translates to ONNX.
The ONNX operators of the same name mean something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_SMALLEST = torch.finfo(torch.float32).tiny


def _clamp(x: Tensor, *given: float | None, **named: float | None) -> Any:
    """Clamp; ONNX's Clip takes the dtype's largest number for a missing bound, which would make infinity finite."""
    low, high = (*given, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    if low is not None and high is not None:
        # One operator, such as ReLU6, fuses with the convolution before it. Its bounds must have one type.
        return NotImplemented if type(low) is type(high) else aten.clamp.default(x, float(low), float(high))
    bound: Any = high if low is None else low
    if high is None and 0 < bound < _SMALLEST:
        # The translation rounds constants to float32, where a lower bound must not become zero.
        bound = _SMALLEST
    dtype = torch.result_type(x, bound)
    limit = torch.full((), bound, dtype=dtype, device=x.device)
    return (torch.minimum if low is None else torch.maximum)(x.to(dtype), limit)


def _searchsorted(scores: Tensor, values: Tensor, **how: Any) -> Any:
    """Count the ``scores`` ``(..., K)`` below each value; 0 for NaN, which later gives NaN at any count."""
    if how.get("right") or how.get("side") == "right" or how.get("sorter") is not None:
        return NotImplemented
    return (scores.unsqueeze(-2) < values.unsqueeze(-1)).sum(-1)


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Sort by TopK, which keeps the order of equal values in ONNX."""
    values, indices = torch.topk(x, x.shape[dim], dim=dim, largest=descending)
    return values, indices


def _avg_pool(
    x: Tensor, kernel: Sequence[int], stride: Any = (), padding: Any = 0, ceil: Any = False, *how: Any, **named: Any
) -> Any:
    """Apply ``divisor_override``, which the translation ignores."""
    divisor = named.get("divisor_override", (*how, None, None)[1])
    if divisor is None or ceil:
        return NotImplemented
    pool = aten.avg_pool2d.default if len(kernel) == 2 else aten.avg_pool3d.default
    return pool(x, kernel, stride, padding) * (math.prod(kernel) / divisor)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return all decompositions by operator, PyTorch's own included."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions().items())
    return table | {
        aten.avg_pool2d.default: _avg_pool,
        aten.avg_pool3d.default: _avg_pool,
        aten.clamp.default: _clamp,
        # The translation does not expand ``source`` to the shape of ``x``.
        aten.copy.default: lambda x, source, *_: source.to(x.dtype).expand(x.shape),
        # The values are overwritten.
        aten.empty_permuted.default: lambda size, *_, dtype=None, device=None, **how: torch.zeros(
            size, dtype=dtype, device=device
        ),
        # A number minus integers, such as those of a mask, has no translation.
        aten.rsub.Scalar: lambda x, a, alpha=1: torch.sub(a, x.to(torch.result_type(x, a)), alpha=alpha),
        aten.searchsorted.Tensor: _searchsorted,
        aten.sort.stable: _stable_sort,
    }
