"""Gradient attacks that need no labels: they push the network away from its own prediction.

They ascend ``logsumexp(z_j, j != k) - z_k``, where k is the predicted class. Its gradient is that of cross-entropy
divided by ``1 - p_k``, so the sign steps are the published ones (Goodfellow et al. 2015, Madry et al. 2018),
but it does not vanish for confident predictions, where float32 cross-entropy has no gradient left.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from fastgrad import checks
from fastgrad.batches import class_logits
from fastgrad.challenges.pixels import PixelRange, check_images
from fastgrad.evaluation import evaluating
from fastgrad.ops.dispatch import full_precision


@torch.inference_mode(False)  # this also turns gradients on
def gradients_reach(model: nn.Module, images: Tensor) -> bool:
    """Whether gradients of the logits reach the images; ``torch.no_grad`` or integers inside the model stop them."""
    point = images.detach().clone().requires_grad_()
    # Warnings that an operation on integers passes no gradient say only what is asked here.
    with evaluating(model), checks.without_warnings():
        try:
            logits = class_logits(model(point.clone()))  # a network may write to its input
            return logits.requires_grad and torch.autograd.grad(logits.sum(), point, allow_unused=True)[0] is not None
        except RuntimeError:
            with torch.no_grad():
                model(point)  # if this fails too, the error has nothing to do with gradients
            # A model made in inference mode counts as reached: it is refused later, with a message about the remedy.
            return any(parameter.is_inference() for parameter in model.parameters())


def away_from(logits: Tensor, predicted: Tensor) -> Tensor:
    """Return how far each prediction has been pushed: ``logsumexp`` of the other logits minus its own."""
    if logits.shape[1] == 1:
        # One logit: its sign is the prediction.
        return -logits[:, 0] * (2 * predicted - 1).to(logits)
    own = logits.gather(1, predicted[:, None])[:, 0]
    others = logits.scatter(1, predicted[:, None], -torch.inf)
    return others.logsumexp(1) - own


def _check(model: nn.Module, unit: Tensor, epsilon: float | Tensor, pixels: PixelRange) -> None:
    checks.is_a(nn.Module, model=model)
    checks.is_a(PixelRange, pixels=pixels)
    check_images(unit, "unit")
    if unit.numel() and not bool((unit.amin() >= 0) & (unit.amax() <= 1)):
        raise ValueError(
            f"unit must lie in [0, 1] (PixelRange.to_unit); it reached [{float(unit.amin()):g}, {float(unit.amax()):g}]"
        )
    if isinstance(epsilon, Tensor):
        checks.is_float("epsilon", epsilon)
    else:
        checks.is_number(epsilon=epsilon)
    if not bool(torch.as_tensor(epsilon >= 0, device="cpu").all()):
        raise ValueError(f"epsilon must not be negative; it was {epsilon}")


def _prediction(logits: Tensor) -> Tensor:
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


@torch.inference_mode(False)
def _ascend(
    model: nn.Module,
    unit: Tensor,
    start: Tensor,
    pixels: PixelRange,
    epsilon: float | Tensor,
    step: float | Tensor,
    steps: int,
) -> Tensor:
    """Take ``steps`` sign steps of size ``step`` from ``start``, within ``epsilon`` of ``unit``."""
    # A start at the images themselves needs no extra pass: the first step also gives the prediction.
    predicted, current = None, start
    if start is not unit:
        with torch.no_grad():
            predicted = _prediction(class_logits(model(pixels.from_unit(unit))))
    for _ in range(steps):
        with torch.enable_grad():
            point = current.detach().clone().requires_grad_()
            logits = class_logits(model(pixels.from_unit(point)))
            if predicted is None:
                predicted = _prediction(logits.detach())
            pushed = away_from(logits, predicted).sum()
        slope = None
        if pushed.requires_grad:
            # Only with respect to the input: no parameter's .grad is touched.
            with full_precision(point.device):
                (slope,) = torch.autograd.grad(pushed, point, allow_unused=True)
        if slope is None:
            raise ValueError(
                "model must pass gradients of its logits to the images for an attack; none came (torch.no_grad inside, "
                "or integers): name challenges without attacks"
            )
        moved = current + step * slope.sign()
        current = torch.maximum(torch.minimum(moved, unit + epsilon), unit - epsilon).clamp(0, 1)
    return current.detach()


def fgsm(
    model: nn.Module, unit: Tensor, epsilon: float | Tensor, generator: Generator, *, pixels: PixelRange
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): one step of ``epsilon`` per pixel.

    Args:
        model: classifier, taking images in their own range; it runs in evaluation mode.
        unit: images ``(B, C, H, W)`` in the unit range.
        epsilon: step in the unit range (commonly 8/255), or one for each image ``(B, 1, 1, 1)``.
        generator: unused; FGSM draws no random numbers.
        pixels: maps the unit range to the one that the model expects.

    Returns:
        Attacked images in the unit range.

    Raises:
        TypeError, ValueError: An argument is not as described.
    """
    _check(model, unit, epsilon, pixels)
    with evaluating(model):
        return _ascend(model, unit, unit, pixels, epsilon, epsilon, 1)


def pgd(
    model: nn.Module,
    unit: Tensor,
    epsilon: float | Tensor,
    generator: Generator,
    *,
    pixels: PixelRange,
    steps: int = 10,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018): a random start, then ``steps`` steps of ``2.5 epsilon / steps``.

    Arguments and result as for :func:`fgsm`; ``generator`` draws the start.
    """
    checks.at_least(1, steps=steps)
    checks.is_a(Generator, generator=generator)
    _check(model, unit, epsilon, pixels)
    offset = (2 * torch.rand(unit.shape, generator=generator, dtype=torch.float32, device="cpu") - 1).to(unit)
    start = (unit + epsilon * offset).clamp(0, 1)
    with evaluating(model):
        return _ascend(model, unit, start, pixels, epsilon, 2.5 * epsilon / steps, steps)
