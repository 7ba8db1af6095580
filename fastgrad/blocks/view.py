"""A second forward pass: how much the answer changes when the image is zoomed in a little."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.blocks.block import Block
from fastgrad.blocks.forward import Pass
from fastgrad.blocks.subject import NO_IMAGE, Subject
from fastgrad.losses import compute_dtype
from fastgrad.scores.one_class import plain

#: Divergences below this are rounding of the two softmaxes.
_LEAST = 1e-6
#: Share of height and width that a view keeps.
_KEPT = 0.9


class View(Block):
    """``log(KL(p(x) || p(view of x)) + 1e-6)``, ``(B, 1)``: one more forward pass, on the enlarged centre of the image.

    The answer to an attack, or to an input between two classes, rarely survives a small change of geometry.
    The view keeps nine tenths of height and width, and cuts off at least one pixel.
    """

    name = "view"
    alarm = "an answer that changes when the image is enlarged a little"
    shapes = "(B, 1)"
    price = 1.0
    scores = (plain,)

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.image is not None else NO_IMAGE

    def of(self, images: Tensor) -> Tensor:
        """Return the view of ``images`` ``(B, C, H, W)``, in the same shape."""
        height, width = images.shape[-2:]
        h, w = (max(1, min(round(_KEPT * length), length - 1)) for length in (height, width))
        top, left = (height - h) // 2, (width - w) // 2
        part = images[..., top : top + h, left : left + w]
        return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)

    def values(self, forward: Pass) -> Tensor:
        image = forward.image()
        dtype = compute_dtype(forward.logits.dtype)
        first = forward.logits.to(dtype).log_softmax(-1)
        second = forward.again(self.of(image)).to(dtype).log_softmax(-1)
        divergence = (first.exp() * (first - second)).sum(-1, keepdim=True)
        return torch.log(divergence.clamp_min(0) + _LEAST)
