"""The identity node that lets a layer's squared norms leave the backward pass as the gradient of a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: ``(saved tensors, output gradients) -> (B, m)`` squared norms.
Norms = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
#: ``output gradient -> input gradient``.
Backward = Callable[[Tensor], Tensor]

# The probes that backward passes under way ask for, by id. A pass to an early probe crosses the nodes of later
# ones, and autograd does not tell a node which of its inputs' gradients are wanted.
_asked: set[int] = set()


@contextlib.contextmanager
def asking(probes: Iterable[Tensor]) -> Iterator[None]:
    """While it lasts, backward passes compute the norms of these probes; of others they compute none."""
    ids = {id(probe) for probe in probes}
    _asked.update(ids)
    try:
        yield
    finally:
        _asked.difference_update(ids)


def is_tapped(output: Tensor) -> bool:
    """Whether ``output`` comes straight from one of this module's nodes."""
    node = output.grad_fn
    return node is not None and node.name() in (f"{_Tap.__name__}Backward", f"{_Layer.__name__}Backward")


def _norms(norms: Norms, probe: int, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor | None:
    if probe not in _asked:
        return None
    # Reduced precision is for the network; the norms are summed in float32 whatever the caller's context.
    with torch.autocast(gradients[0].device.type, enabled=False):
        return norms(saved, gradients)


class _Tap(torch.autograd.Function):
    """``outputs -> outputs``; backward passes the gradients on and gives the probe the squared norms."""

    @staticmethod
    def forward(ctx: Any, norms: Norms, count: int, in_place: bool, *tensors: Tensor) -> Any:
        # The outputs come first: autograd takes the first input of a node that modifies a view for that view.
        outputs, saved = tensors[:count], tensors[count + 1 :]
        ctx.norms, ctx.probe, ctx.saved_count = norms, id(tensors[count]), len(saved)
        ctx.save_for_backward(*saved)
        if in_place:
            # Returned as if modified in place: neither a copy nor a view, so a later in-place activation may
            # overwrite it.
            ctx.mark_dirty(*outputs)
        else:
            outputs = tuple(output.clone() for output in outputs)
        return outputs[0] if count == 1 else outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        norms = _norms(ctx.norms, ctx.probe, ctx.saved_tensors, gradients)
        return (None, None, None, *gradients, norms, *(None for _ in range(ctx.saved_count)))


class _Layer(torch.autograd.Function):
    """The same for a layer with a backward pass of its own, which takes the place of autograd's."""

    @staticmethod
    def forward(
        ctx: Any, norms: Norms, backward: Backward, output: Tensor, probe: Tensor, value: Tensor
    ) -> Tensor:
        ctx.norms, ctx.probe, ctx.input_gradient = norms, id(probe), backward
        ctx.save_for_backward(value)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        norms = _norms(ctx.norms, ctx.probe, ctx.saved_tensors, gradients)
        onward = None
        if ctx.needs_input_grad[4]:
            with torch.autocast(gradients[0].device.type, enabled=False):
                onward = ctx.input_gradient(gradients[0])
        return None, None, None, norms, onward


def tap_layer(output: Tensor, value: Tensor, probe: Tensor, norms: Norms, backward: Backward) -> Tensor:
    """Like `tap` for a layer with one input, whose gradient comes from ``backward`` instead of from autograd.

    Args:
        output: The layer's output; what autograd recorded of it is dropped.
        value: The layer's input, as autograd knows it; also what ``norms`` gets of the forward pass.
        probe: As in `tap`.
        norms: As in `tap`.
        backward: Turns the gradient at the output into that at the input.

    Returns:
        The output to go on with.
    """
    passed: Tensor = _Layer.apply(norms, backward, output.detach(), probe, value)  # type: ignore[no-untyped-call]
    return passed


def tap(
    outputs: Sequence[Tensor], saved: Sequence[Tensor], probe: Tensor, norms: Norms, *, in_place: bool
) -> list[Tensor]:
    """Route ``outputs`` through an identity node.

    Args:
        outputs: A layer's floating-point outputs.
        saved: What ``norms`` needs of the forward pass; kept by reference, checked against later modification.
        probe: Zeros of shape ``(B, m)`` that require gradients; their gradient will be the squared norms, where a
            backward pass asks for them (`asking`).
        norms: Computes them from ``saved`` and the output gradients; may run under ``vmap`` over gradients.
        in_place: Whether the outputs may be passed on as they are. Only where the operation that made them did
            not save them for its own backward; otherwise they are copied.

    Returns:
        The outputs to go on with.
    """
    passed = _Tap.apply(norms, len(outputs), in_place, *outputs, probe, *(t.detach() for t in saved))  # type: ignore[no-untyped-call]
    return [passed] if len(outputs) == 1 else list(passed)
