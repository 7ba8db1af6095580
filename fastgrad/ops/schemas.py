"""The schema of every operator, beside its fake form: shapes and dtypes of the results, without values.

The operators exist for the Triton kernels, which a tracer cannot see into. Those of the last layer take matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import check
from fastgrad.losses import compute_dtype

_CONV = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_CONV_SQNORM = f"(Tensor a, Tensor g, {_CONV}, bool transposed, str? route, str impl) -> Tensor"


def _define(name: str, schema: str, fake: Callable[..., Any] | None = None) -> None:
    torch.library.define(f"fastgrad::{name}", schema)
    if fake is not None:
        torch.library.register_fake(f"fastgrad::{name}", fake)


def _contrast(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    _rows_agree(features, logits)
    return logits.new_empty(logits.shape, dtype=compute_dtype(logits.dtype))


def _target(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    _rows_agree(features, logits)
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


def _linear_contrast(features: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _columns_agree(features, weight)
    shape = (features.shape[0], weight.shape[0])
    return features.new_empty(shape), features.new_empty(shape, dtype=compute_dtype(features.dtype))


def _linear_stats(features: Tensor, weight: Tensor, *options: Any) -> Tensor:
    _columns_agree(features, weight)
    return features.new_empty((features.shape[0], 5), dtype=compute_dtype(features.dtype))


def _layer(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=compute_dtype(torch.promote_types(a.dtype, g.dtype)))


def _layer_kernel(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    check(g.dim() == a.dim() + 1, lambda: f"g must be {a.dim() + 1}-D; it was {g.dim()}-D")
    return g.new_empty(g.shape[:2], dtype=torch.float32)


def _is_matrix(name: str, tensor: Tensor) -> None:
    check(tensor.dim() == 2, lambda: f"{name} must be 2-D; it was {tensor.dim()}-D")


def _rows_agree(features: Tensor, logits: Tensor) -> None:
    _is_matrix("features", features)
    _is_matrix("logits", logits)
    rows = features.shape[0], logits.shape[0]
    check(rows[0] == rows[1], lambda: f"features and logits must have one row a sample; they had {rows}")


def _columns_agree(features: Tensor, weight: Tensor) -> None:
    _is_matrix("features", features)
    _is_matrix("weight", weight)
    D, columns = features.shape[1], weight.shape[1]
    check(columns == D, lambda: f"weight must have D={D} columns; it had {columns}")


_define(
    "contrast_sqnorm", "(Tensor features, Tensor logits, str loss, bool bias, bool log, bool mean) -> Tensor", _contrast
)
_define(
    "target_sqnorm",
    "(Tensor features, Tensor logits, Tensor? target, str kind, str loss, bool bias, bool log, bool mean) -> Tensor",
    _target,
)
_define(
    "linear_contrast_sqnorm",
    "(Tensor features, Tensor weight, Tensor? bias, str loss, bool log, bool mean) -> (Tensor, Tensor)",
    _linear_contrast,
)
_define(
    "linear_contrast_stats",
    "(Tensor features, Tensor weight, Tensor? bias, str loss, bool mean) -> Tensor",
    _linear_stats,
)
# A composition, which tracers see through; and the same as one node, for compilation in this process.
_define("conv_sqnorm", _CONV_SQNORM)
_define("conv_sqnorm_whole", _CONV_SQNORM, _layer)
_define("conv_sqnorm_kernel", f"(Tensor a, Tensor g, {_CONV}) -> Tensor", _layer_kernel)
_define("linear_sqnorm_kernel", "(Tensor a, Tensor g) -> Tensor", _layer_kernel)
