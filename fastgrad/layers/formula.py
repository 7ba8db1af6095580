"""From what a function was given and its output gradients to the gradients of its parameters, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgrad.layers.reduce import sqnorm, upcast

Tensors = Sequence[Tensor]


class Formula:
    """How one kind of function turns saved tensors and output gradients into gradients of its parameters.

    All tensors have a row for each of B samples. Parameters are known by their place, their ``slot``.
    """

    #: The kind, as it appears in reports.
    name = ""
    #: Whether it differentiates, so that output gradients must come one after the other and not under ``vmap``.
    replays = False

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        """Return the squared norms ``(B,)`` of each sample's gradient of the parameters in ``slots``."""
        return [sqnorm(upcast(self.gradient(saved, gradients, slot))[0]) for slot in slots]

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        """Return each sample's gradient ``(B, *shape)`` of the parameter in ``slot``."""
        raise NotImplementedError

    def factors(self, saved: Tensors, gradients: Tensors, slot: int) -> tuple[Tensor, Tensor] | None:
        """Return ``(B, T, C)`` and ``(B, T, O)`` whose products, summed over T, are the gradient ``(B, C, O)``.

        The gradient may have its two dimensions in either order. None if it has no such form.
        """
        return None


class Copies(Formula):
    """Of a parameter of which each sample has a copy: its output gradient is the sample's own gradient."""

    name = "copies"

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        return gradients[0]
