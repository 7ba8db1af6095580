"""What ONNX has no operator for, written in operators that it has.

`torch.export.ExportedProgram.run_decompositions` puts these in the place of ATen's operators before PyTorch's own
translation to ONNX: the few operations of backward passes that are no combination of others in PyTorch, and operators
whose ONNX namesake means something else.
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
    """ONNX's Clip without a bound takes the dtype's largest number for it: infinity would pass for finite.

    PyTorch's translation rounds numbers in the code to float32, where a lower bound must not become zero.
    """
    low, high = (*given, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    if high is None and low is not None:
        low = _SMALLEST if 0 < low < _SMALLEST else low
        return torch.maximum(x, torch.full((), low, dtype=x.dtype, device=x.device))
    if low is None and high is not None:
        return torch.minimum(x, torch.full((), high, dtype=x.dtype, device=x.device))
    # A network's own ReLU6: one operator, which joins the convolution before.
    return NotImplemented


def _searchsorted(
    scores: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Any:
    """How many ``scores`` ``(K,)`` lie below each value; of NaN, which ends in NaN whatever the place, none."""
    if right or side == "right" or sorter is not None or scores.dim() != 1:
        return NotImplemented
    return (scores < values.unsqueeze(-1)).sum(-1)


def _square(x: Tensor, exponent: float) -> Any:
    """A product, which ONNX Runtime computes in a convolution's blocked layout, as it does no power."""
    return x * x if exponent == 2 else NotImplemented


def _sum(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Rows of an image, or all of it, as a pooling, likewise: a sum would bring its input into another layout first."""
    summed = sorted(axis % 4 for axis in dim or ())
    plain = x.dim() == 4 and not keepdim and dtype is None and x.dtype == torch.float32
    if not plain or summed not in ([3], [2, 3]) or not all(isinstance(size, int) for size in x.shape[2:]):
        return NotImplemented
    window = [x.shape[axis] if axis in summed else 1 for axis in (2, 3)]
    return aten.avg_pool2d.default(x, window).squeeze(tuple(summed)) * math.prod(window)


def _stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """ONNX's TopK keeps the order of equal values."""
    values, indices = torch.topk(x, x.shape[dim], dim=dim, largest=descending)
    return values, indices


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Any:
    """The input's gradient, a transposed convolution of the output's; sums for the bias; none for the weight."""
    if mask[1]:
        return NotImplemented
    extra = [0] * len(stride)
    if not transposed:
        # What the stride cut off at the end of the input.
        extra = [
            x.shape[2 + i]
            - (
                (grad.shape[2 + i] - 1) * stride[i]
                - 2 * padding[i]
                + dilation[i] * (weight.shape[2 + i] - 1)
                + 1
            )
            for i in range(len(stride))
        ]
    back = aten.convolution.default(
        grad, weight, None, stride, padding, dilation, not transposed, extra, groups
    )
    return back if mask[0] else None, None, grad.sum([0, *range(2, grad.dim())]) if mask[2] else None


def _max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Each output's gradient goes to the pixel that it was taken from."""
    flat = torch.zeros_like(x).flatten(2)
    return flat.scatter_add(2, indices.flatten(2), grad.flatten(2)).view(x.shape)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every decomposition, PyTorch's own among them, by operator."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions().items())
    return table | {
        aten.clamp.default: _clamp,
        aten.convolution_backward.default: _convolution_backward,
        aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
        aten.pow.Tensor_Scalar: _square,
        aten.searchsorted.Tensor: _searchsorted,
        aten.sort.stable: _stable_sort,
        aten.sum.dim_IntList: _sum,
    }
