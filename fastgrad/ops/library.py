"""The schemas of the operators of the last layer, and their shape contracts.

All operators take matrices (any strides) and live in the namespace ``fastgrad``. They exist for the Triton kernels,
which a tracer cannot see into: ``torch.compile`` and ``torch.export`` keep them as one node whose output shapes are
stated here. The eager implementations behind the same schemas are plain torch; the public functions call those
directly, so that compilers fuse them and exported files carry no custom operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.losses import compute_dtype

_OPTIONS = "str loss, str reduction, bool log, str impl"

SCHEMAS = {
    "contrast_sqnorm": f"(Tensor features, Tensor logits, bool bias, {_OPTIONS}) -> Tensor",
    "target_sqnorm": f"(Tensor features, Tensor logits, Tensor? target, str kind, bool bias, {_OPTIONS}) -> Tensor",
    "linear_contrast_sqnorm": f"(Tensor features, Tensor weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    "linear_contrast_stats": (
        "(Tensor features, Tensor weight, Tensor? bias, str loss, str reduction, str impl) -> Tensor"
    ),
    "rows_linear": "(Tensor features, Tensor diagonal, Tensor weight, Tensor? bias, str impl) -> Tensor",
    # Not of the last layer: a tensor of any shape. Its contract stands beside its implementation.
    "channel_moments": "(Tensor x, int dim) -> (Tensor sum, Tensor sum_of_squares)",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastgrad::{_name}", _schema)


def _paired(features: Tensor, logits: Tensor) -> None:
    torch._check(features.dim() == 2, lambda: f"features must be 2-D; it was {features.dim()}-D")
    torch._check(logits.dim() == 2, lambda: f"logits must be 2-D; it was {logits.dim()}-D")
    torch._check(
        features.shape[0] == logits.shape[0],
        lambda: (
            f"features and logits must have one row a sample; they had {features.shape[0]}, {logits.shape[0]}"
        ),
    )


def _head(features: Tensor, weight: Tensor) -> None:
    torch._check(features.dim() == 2, lambda: f"features must be 2-D; it was {features.dim()}-D")
    torch._check(weight.dim() == 2, lambda: f"weight must be 2-D; it was {weight.dim()}-D")
    torch._check(
        features.shape[1] == weight.shape[1],
        lambda: f"weight must have D={features.shape[1]} columns; it had {weight.shape[1]}",
    )


@torch.library.register_fake("fastgrad::contrast_sqnorm")
def _(
    features: Tensor, logits: Tensor, bias: bool, loss: str, reduction: str, log: bool, impl: str
) -> Tensor:
    _paired(features, logits)
    return logits.new_empty(logits.shape, dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("fastgrad::target_sqnorm")
def _(
    features: Tensor,
    logits: Tensor,
    target: Tensor | None,
    kind: str,
    bias: bool,
    loss: str,
    reduction: str,
    log: bool,
    impl: str,
) -> Tensor:
    _paired(features, logits)
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("fastgrad::linear_contrast_sqnorm")
def _(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, log: bool, impl: str
) -> tuple[Tensor, Tensor]:
    _head(features, weight)
    shape = (features.shape[0], weight.shape[0])
    return features.new_empty(shape), features.new_empty(shape, dtype=compute_dtype(features.dtype))


@torch.library.register_fake("fastgrad::linear_contrast_stats")
def _(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, impl: str) -> Tensor:
    _head(features, weight)
    return features.new_empty((features.shape[0], 5), dtype=compute_dtype(features.dtype))


@torch.library.register_fake("fastgrad::rows_linear")
def _(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    _paired(features, diagonal)
    return features.new_empty((features.shape[0], weight.shape[0]), dtype=compute_dtype(features.dtype))
