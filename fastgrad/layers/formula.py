"""Per-sample gradients of a function's parameters, from its inputs and output gradients, and their reductions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgrad.losses import compute_dtype

Tensors = Sequence[Tensor]


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype in which they are summed, float32 or float64, without a copy if they have it."""
    dtype = compute_dtype(*(t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sqnorm(x: Tensor) -> Tensor:
    """Return the squared L2 norm over everything but dimension 0: ``(B, ...) -> (B,)``."""
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return flat.square().sum(1)


def positions_first(x: Tensor, trailing: int) -> Tensor:
    """Flatten the dimensions between the batch and the last ``trailing`` ones: ``(B, T, *trailing)``; T may be 1."""
    keep = x.dim() - trailing
    return x.unsqueeze(1) if keep == 1 else x.flatten(1, keep - 1)


class Formula:
    """How one kind of function turns saved tensors and output gradients into its parameters' gradients.

    All tensors have a row for each of B samples. A ``slot`` is the place of a parameter in the function's weights.
    `sqnorms` and `part` need `gradient` unless they are overridden, where forming whole gradients would be dearer.
    """

    #: The kind, as it appears in reports.
    name = ""

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        """Return the squared norms ``(B,)`` of each sample's gradient of the parameters in ``slots``."""
        return [sqnorm(upcast(self.gradient(saved, gradients, slot))[0]) for slot in slots]

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        """Return each sample's gradient ``(B, *shape)`` of the parameter in ``slot``."""
        raise NotImplementedError

    def part(self, saved: Tensors, gradients: Tensors, slot: int, at: slice) -> Tensor:
        """Return each sample's gradient, of a part of the parameter.

        ``at`` are places in the parameter's dimension 0, or 1 if it has three dimensions or more: a convolution's
        channels.
        """
        found = self.gradient(saved, gradients, slot)
        if at == slice(None):
            return found
        return found[:, at] if found.dim() < 4 else found[:, :, at]

    def positions(self, saved: Tensors, gradients: Tensors, slot: int) -> int:
        """Return T if `factors` serve, or else 0."""
        return 0

    def factors(self, saved: Tensors, gradients: Tensors, slot: int) -> tuple[Tensor, Tensor]:
        """Return ``(B, T, R)`` and ``(B, T, C)``, whose outer products, summed over T, are the gradient ``(B, R, C)``.

        ``R`` is the parameter's dimension 0 and ``C`` all others. One-hot vectors may be given as their indices,
        integers ``(B, T)``.
        """
        raise NotImplementedError


class Copies(Formula):
    """A parameter of which each sample has a copy: the gradient of the copy is the sample's own gradient."""

    name = "copies"

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        return gradients[0]
