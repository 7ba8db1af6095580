"""The last layer fused with its contrasts: features and weights in, logits and squared norms (or statistics) out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastgrad.ops.dispatch import launcher, operator
from fastgrad.ops.last_layer import contrast

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
    """``(B, 5)``: min, max, mean, expected and predicted, a few rows at a time.

    With gradients wanted, each piece is computed again in the backward pass instead of being kept.
    """
    rows = max(1, _CHUNK // max(weight.shape[0], 1))
    if torch.compiler.is_compiling() or features.shape[0] <= rows:
        return _statistics(features, weight, bias, loss, mean)
    pieces = features.split(rows)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (features, weight, bias)):
        parts = [checkpoint(_statistics, piece, weight, bias, loss, mean, use_reentrant=False) for piece in pieces]
    else:
        parts = [_statistics(piece, weight, bias, loss, mean) for piece in pieces]
    return torch.cat(parts)


linear_contrast_sqnorm = operator(
    "linear_contrast_sqnorm", eager, launcher("linear_contrast", "linear_contrast_sqnorm")
)
linear_contrast_stats = operator(
    "linear_contrast_stats", eager_stats, launcher("linear_contrast", "linear_contrast_stats")
)
