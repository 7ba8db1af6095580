"""Operations that ONNX lacks, composed of operators that it has.

`torch.export.ExportedProgram.run_decompositions` replaces ATen's operators by these before PyTorch's own translation to
ONNX. They are the few operations of backward passes that PyTorch does not compose of others, and operators whose ONNX
namesake means something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
#: `run_decompositions` leaves these as they are: PyTorch has them both as compositions and as kernels.
PASSED_OVER = (aten.silu_backward.default, aten.mish_backward.default)
_SMALLEST = torch.finfo(torch.float32).tiny
#: Factor that turns a slope into a step. It is a power of two, so products with it are exact.
_STEEP = 2.0**100


def _clamp(x: Tensor, *given: float | None, **named: float | None) -> Any:
    """Clamp; for a missing bound ONNX's Clip takes the dtype's largest number, which would make infinity finite."""
    low, high = (*given, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    if low is not None and high is not None:
        # As in ReLU6: one operator, which fuses with the convolution before it. Its bounds must have one type.
        return NotImplemented if type(low) is type(high) else aten.clamp.default(x, float(low), float(high))
    bound: Any = high if low is None else low
    if high is None and 0 < bound < _SMALLEST:
        # The translation rounds numbers in the code to float32, where a lower bound must not become zero.
        bound = _SMALLEST
    dtype = torch.result_type(x, bound)
    limit = torch.full((), bound, dtype=dtype, device=x.device)
    return (torch.minimum if low is None else torch.maximum)(x.to(dtype), limit)


def _searchsorted(scores: Tensor, values: Tensor, **how: Any) -> Any:
    """Count the ``scores`` ``(..., K)`` below each value; none for NaN, which later gives NaN at any count."""
    if how.get("right") or how.get("side") == "right" or how.get("sorter") is not None:
        return NotImplemented
    return (scores.unsqueeze(-2) < values.unsqueeze(-1)).sum(-1)


def _above(x: Tensor, sign: float, edge: float) -> Tensor:
    """Return 1 where ``sign * (x - edge)`` is positive, else 0, for images ``(B, C, H, W)``.

    A convolution with one weight per channel and its fused activation keep the runtime's blocked layout, which a
    comparison would leave.
    """
    channels = x.shape[1]
    weight = torch.full((channels, 1, 1, 1), sign * _STEEP, dtype=x.dtype, device=x.device)
    bias = torch.full((channels,), -sign * edge * _STEEP, dtype=x.dtype, device=x.device)
    steep: Tensor = aten.convolution.default(x, weight, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], channels)
    return steep.clamp(0, 1)


def _is_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.dtype == torch.float32 and isinstance(x.shape[1], int)


def _threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Differentiate a ReLU: the gradient passes where ``x`` is above the threshold."""
    return grad * _above(x, 1.0, threshold) if _is_images(x) else torch.where(x <= threshold, 0.0, grad)


def _hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Differentiate a ReLU6: the gradient passes where ``x`` is between the two."""
    if _is_images(x):
        return grad * _above(x, 1.0, low) * _above(x, -1.0, high)
    return torch.where((x <= low) | (x >= high), 0.0, grad)


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Sort by TopK, which in ONNX keeps the order of equal values."""
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
    """Return the input's gradient, a transposed convolution of the output's, and the bias's, sums; no weight's."""
    if mask[1]:
        return NotImplemented
    bias = grad.sum([0, *range(2, grad.dim())]) if mask[2] else None
    turned = [d * (n - 1) - p for d, n, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    if not transposed and set(stride) == {1} and min(turned) >= 0:
        # An ordinary convolution with the flipped kernel, which a runtime computes several times as fast. It flips
        # constant weights when it loads the file.
        kernel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(tuple(range(2, weight.dim())))
        back = aten.convolution.default(grad, kernel, None, stride, turned, dilation, False, [0] * len(stride), groups)
        return back if mask[0] else None, None, bias
    extra = [0] * len(stride)
    if not transposed:
        # Positions that the stride cut off at the end of the input.
        sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        extra = [size - ((out - 1) * s - 2 * p + d * (kernel - 1) + 1) for size, out, kernel, s, p, d in sizes]
    back = aten.convolution.default(grad, weight, None, stride, padding, dilation, not transposed, extra, groups)
    return back if mask[0] else None, None, bias


def _avg_pool(
    x: Tensor, kernel: Sequence[int], stride: Any = (), padding: Any = 0, ceil: Any = False, *how: Any, **named: Any
) -> Any:
    """Apply ``divisor_override``, which the translation ignores."""
    divisor = named.get("divisor_override", (*how, None, None)[1])
    if divisor is None or ceil:
        return NotImplemented
    pool = aten.avg_pool2d.default if len(kernel) == 2 else aten.avg_pool3d.default
    return pool(x, kernel, stride, padding) * (math.prod(kernel) / divisor)


def _parts(x: Tensor, axis: int, start: Tensor, end: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the weights ``(outputs, positions)`` of positions along an axis in means from ``start`` to ``end``."""
    place = torch.arange(x.shape[axis], device=x.device)
    inside = ((place >= start[:, None]) & (place < end[:, None])).to(x.dtype)
    return inside / (inside.sum(1, keepdim=True) if counts is None else counts[:, None])


def _avg_pool2d_backward(grad: Tensor, x: Tensor, *window: Any) -> Any:
    """Distribute each output's gradient over the pixels of its window, by their weight in the mean."""
    kernel, stride, padding, _, padding_counts, divisor = window
    if divisor is not None or len(kernel) == 1:
        return NotImplemented
    parts = []
    for axis, size, step, edge in zip((-2, -1), kernel, stride or kernel, padding, strict=True):
        start = torch.arange(grad.shape[axis], device=x.device) * step - edge
        end = (start + size).clamp(max=x.shape[axis] + edge)
        parts.append(_parts(x, axis, start, end, end - start if padding_counts else None))
    return parts[0].mT @ grad @ parts[1]


def _adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    parts = []
    for axis in (-2, -1):
        number, size, outputs = torch.arange(grad.shape[axis], device=x.device), x.shape[axis], grad.shape[axis]
        end = ((number + 1) * size + outputs - 1) // outputs
        parts.append(_parts(x, axis, number * size // outputs, end))
    return parts[0].mT @ grad @ parts[1]


def _max_pool2d_backward(grad: Tensor, x: Tensor, *window: Any) -> Tensor:
    """Add each output's gradient to the pixel that was its maximum, whose index is in the last argument."""
    indices, flat = window[-1], torch.zeros_like(x).flatten(2)
    return flat.scatter_add(2, indices.flatten(2), grad.flatten(2)).view(x.shape)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return all decompositions by operator, PyTorch's own included."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions().items())
    return table | {
        aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
        aten.avg_pool2d.default: _avg_pool,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
        aten.avg_pool3d.default: _avg_pool,
        aten.clamp.default: _clamp,
        aten.convolution_backward.default: _convolution_backward,
        # The translation would not expand ``source`` to the shape of ``x``.
        aten.copy.default: lambda x, source, *_: source.to(x.dtype).expand(x.shape),
        # Any values will do: they are overwritten.
        aten.empty_permuted.default: lambda size, *_, dtype=None, device=None, **how: torch.zeros(
            size, dtype=dtype, device=device
        ),
        aten.hardtanh_backward.default: _hardtanh_backward,
        aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
        # A number minus integers, such as a mask, has no translation.
        aten.rsub.Scalar: lambda x, a, alpha=1: torch.sub(a, x.to(torch.result_type(x, a)), alpha=alpha),
        aten.searchsorted.Tensor: _searchsorted,
        aten.sort.stable: _stable_sort,
        aten.threshold_backward.default: _threshold_backward,
    }
