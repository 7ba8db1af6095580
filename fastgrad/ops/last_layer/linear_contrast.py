"""The last layer fused with its contrasts: features and weights in, logits and squared norms (or statistics) out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgrad._torch import check
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import operator
from fastgrad.ops.last_layer import contrast
from fastgrad.ops.last_layer.rows import in_pieces

# Statistics never hold more than this many logits at a time (or one row, where a row is longer).
_CHUNK = 1 << 22


def eager(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, log: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """Logits in the dtype of the features, and the squared norms of exactly these (rounded) logits."""
    logits = linear(features, weight, bias)
    norms = contrast.eager(features, logits, loss, bias is not None, log, mean)
    return logits, norms


def _statistics(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    logits = linear(features, weight, bias)
    norms = contrast.eager(features, logits, loss, bias is not None, False, mean)
    p = logits.to(norms.dtype).softmax(-1)
    predicted = norms.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    columns = (norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1), predicted)
    return torch.stack(columns, -1)


def eager_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    """``(B, 5)``: min, max, mean, expected and predicted, a few rows at a time."""
    rows = max(1, _CHUNK // max(weight.shape[0], 1))
    if torch.compiler.is_compiling() or features.shape[0] <= rows:
        return _statistics(features, weight, bias, loss, mean)
    return torch.cat(in_pieces(_statistics, features.split(rows), weight, bias, loss, mean))


def _fake(features: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    check(
        features.dim() == weight.dim() == 2 and features.shape[1] == weight.shape[1],
        lambda: (
            "features and weight must be matrices with one column a feature; "
            f"their shapes were {tuple(features.shape)} and {tuple(weight.shape)}"
        ),
    )
    logits = features.new_empty((features.shape[0], weight.shape[0]))
    return logits, torch.empty_like(logits, dtype=compute_dtype(logits.dtype))


def _fake_stats(features: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return _fake(features, weight)[1].new_empty((features.shape[0], 5))


linear_contrast_sqnorm = operator("linear_contrast_sqnorm", "linear_contrast", eager, _fake)
linear_contrast_stats = operator("linear_contrast_stats", "linear_contrast", eager_stats, _fake_stats)
