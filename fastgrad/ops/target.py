"""Squared norm of the last layer's gradient for one label a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad import losses

from . import library  # noqa: F401  (defines the schema)
from .implementation import choose


def _label(target: Tensor | None, kind: str) -> Tensor | str:
    return kind if target is None else target


def eager(
    features: Tensor,
    logits: Tensor,
    target: Tensor | None,
    kind: str,
    bias: bool,
    loss: str,
    reduction: str,
    log: bool,
) -> Tensor:
    """The definition in plain torch, ``(B,)``; differentiable to any order."""
    norms = losses.target_norms(logits, _label(target, kind), loss=loss, reduction=reduction, log=log)
    scale = features.to(norms.dtype).square().sum(-1) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _forward(
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
    if choose(impl, logits) == "eager":
        return eager(features, logits, target, kind, bias, loss, reduction, log)
    from .triton import target as launcher

    return launcher.target_sqnorm(features, logits, target, kind, loss, bias, log, reduction == "mean")


torch.library.impl("fastgrad::target_sqnorm", "CompositeExplicitAutograd", _forward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, logits, target, *options, _ = inputs
    ctx.save_for_backward(features, logits, target)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, logits, target = ctx.saved_tensors
    inputs = [features.detach().requires_grad_(), logits.detach().requires_grad_()]
    soft = target is not None and target.is_floating_point()
    if soft:
        target = target.detach().requires_grad_()
        inputs.append(target)
    with torch.enable_grad():
        value = eager(inputs[0], inputs[1], target, *ctx.options)
    grads = torch.autograd.grad(value, inputs, grad, allow_unused=True)
    return (grads[0], grads[1], grads[2] if soft else None, None, None, None, None, None, None)


torch.library.register_autograd("fastgrad::target_sqnorm", _backward, setup_context=_setup)


def target_sqnorm(
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
    """Route to the implementation that serves the tensors; ``kind`` names the label where ``target`` is None."""
    if choose(impl, logits) == "triton":
        result: Tensor = torch.ops.fastgrad.target_sqnorm(
            features, logits, target, kind, bias, loss, reduction, log, "triton"
        )
        return result
    return eager(features, logits, target, kind, bias, loss, reduction, log)
