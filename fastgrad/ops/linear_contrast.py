"""The last layer fused with its contrasts: features and weights in, logits and squared norms (or statistics) out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from . import contrast, library  # noqa: F401  (library defines the schemas)
from .implementation import choose

# Statistics never hold more than this many logits at a time (or one row, where a row is longer).
_CHUNK = 1 << 22


def eager(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, log: bool
) -> tuple[Tensor, Tensor]:
    """Logits in the dtype of the features, and the squared norms of exactly these (rounded) logits."""
    logits = linear(features, weight, bias)
    norms = contrast.contrast_sqnorm(features, logits, bias is not None, loss, reduction, log, "eager")
    return logits, norms


def _statistics(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str) -> Tensor:
    logits = linear(features, weight, bias)
    norms = contrast.contrast_sqnorm(features, logits, bias is not None, loss, reduction, False, "eager")
    p = logits.to(norms.dtype).softmax(-1)
    predicted = norms.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    columns = (norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1), predicted)
    return torch.stack(columns, -1)


def eager_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str) -> Tensor:
    """``(B, 5)``: min, max, mean, expected and predicted, a few rows at a time.

    With gradients wanted, each piece is computed again in the backward pass instead of being kept.
    """
    rows = max(1, _CHUNK // max(weight.shape[0], 1))
    if torch.compiler.is_compiling() or features.shape[0] <= rows:
        return _statistics(features, weight, bias, loss, reduction)
    pieces = features.split(rows)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (features, weight, bias)):
        parts = [
            checkpoint(_statistics, piece, weight, bias, loss, reduction, use_reentrant=False)
            for piece in pieces
        ]
    else:
        parts = [_statistics(piece, weight, bias, loss, reduction) for piece in pieces]
    return torch.cat(parts)


def _forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, log: bool, impl: str
) -> tuple[Tensor, Tensor]:
    if choose(impl, features) == "eager":
        return eager(features, weight, bias, loss, reduction, log)
    from .triton import linear_contrast as launcher

    return launcher.linear_contrast_sqnorm(features, weight, bias, loss, log, reduction == "mean")


def _forward_stats(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, impl: str
) -> Tensor:
    if choose(impl, features) == "eager":
        return eager_stats(features, weight, bias, loss, reduction)
    from .triton import linear_contrast as launcher

    return launcher.linear_contrast_stats(features, weight, bias, loss, reduction == "mean")


torch.library.impl("fastgrad::linear_contrast_sqnorm", "CompositeExplicitAutograd", _forward)
torch.library.impl("fastgrad::linear_contrast_stats", "CompositeExplicitAutograd", _forward_stats)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, weight, bias, *options, _ = inputs
    ctx.save_for_backward(features, weight, bias)
    ctx.options = options


def _recompute(ctx: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    saved = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    return [t for t in saved if t is not None], saved


def _backward(ctx: Any, grad_logits: Tensor | None, grad_norms: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted, (features, weight, bias) = _recompute(ctx)
    assert features is not None
    assert weight is not None
    with torch.enable_grad():
        outputs = eager(features, weight, bias, *ctx.options)
    grads = torch.autograd.grad(outputs, wanted, (grad_logits, grad_norms))
    return (*grads, *([None] if bias is None else []), None, None, None, None)


def _backward_stats(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted, (features, weight, bias) = _recompute(ctx)
    assert features is not None
    assert weight is not None
    with torch.enable_grad():
        stats = eager_stats(features, weight, bias, *ctx.options)
    grads = torch.autograd.grad(stats, wanted, grad)
    return (*grads, *([None] if bias is None else []), None, None, None)


torch.library.register_autograd("fastgrad::linear_contrast_sqnorm", _backward, setup_context=_setup)
torch.library.register_autograd("fastgrad::linear_contrast_stats", _backward_stats, setup_context=_setup)


def linear_contrast_sqnorm(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, log: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Route ``(B, D)`` features to the implementation that serves them."""
    if choose(impl, features) == "triton":
        logits, norms = torch.ops.fastgrad.linear_contrast_sqnorm(
            features, weight, bias, loss, reduction, log, "triton"
        )
        return logits, norms
    return eager(features, weight, bias, loss, reduction, log)


def linear_contrast_stats(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, impl: str
) -> Tensor:
    """Route ``(B, D)`` features to the implementation that serves them; ``(B, 5)``."""
    if choose(impl, features) == "triton":
        result: Tensor = torch.ops.fastgrad.linear_contrast_stats(
            features, weight, bias, loss, reduction, "triton"
        )
        return result
    return eager_stats(features, weight, bias, loss, reduction)
