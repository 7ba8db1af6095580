"""An identity node whose backward pass hands a function's output gradients to a visitor."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import drop_view_base
from fastgrad.ops.dispatch import full_precision

#: A function of saved tensors and output gradients.
Visit = Callable[[Sequence[Tensor], Sequence[Tensor]], None]

# The visitors of backward passes under way, by the id of the probe. A pass to an early probe crosses the nodes of later
# ones, and autograd does not tell a node which of its inputs' gradients are wanted. Backward passes on a GPU run in
# other threads, so the table belongs to the process.
_visits: dict[int, Visit] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def visiting(visits: Mapping[int, Visit]) -> Iterator[None]:
    """Have backward passes in this context call these functions at the probes with these ids."""
    with _lock:
        _visits.update(visits)
    try:
        yield
    finally:
        with _lock:
            for key in visits:
                del _visits[key]


class _Tap(torch.autograd.Function):
    """``outputs -> outputs``; ``backward`` passes the gradients on and lets the visitor of the probe see them."""

    @staticmethod
    def forward(ctx: Any, count: int, in_place: bool, *tensors: Tensor) -> Any:
        # The outputs come first: if a node modifies a view, autograd assumes that its first input is this view.
        outputs, probe, saved = tensors[:count], tensors[count], tensors[count + 1 :]
        ctx.probe, ctx.saved_count = probe, len(saved)
        ctx.save_for_backward(*saved)
        if in_place:
            # Returned as if modified in place: neither a copy nor a view, so a later activation may overwrite it.
            ctx.mark_dirty(*outputs)
        else:
            outputs = tuple(output.clone() for output in outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        visit = _visits.get(id(ctx.probe))
        if visit is not None:
            saved = ctx.saved_tensors  # for which a checkpoint may compute again, in the model's own precision
            with full_precision(gradients[0].device):
                visit(saved, gradients)
        if torch.is_grad_enabled():
            gradients = _Graphed.apply(ctx.probe, *gradients)
        return (None, None, *gradients, *[None] * (1 + ctx.saved_count))


class _Graphed(torch.autograd.Function):
    """``gradients -> gradients`` of a backward pass with a graph; no probe sees what layers do in that graph."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, *gradients: Tensor) -> Any:
        ctx.probe = probe
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if id(ctx.probe) in _visits:
            raise ValueError(
                "outputs must not be computed from gradients that passed the recorded model (create_graph=True, as in "
                "a gradient penalty): its layers then have a part in them of which no gradient per sample is known. "
                "Take these gradients in the forward of a module of your own, and record this"
            )
        return None, *gradients


def tap(outputs: Sequence[Tensor], saved: Sequence[Tensor], probe: Tensor, *, in_place: bool) -> list[Tensor]:
    """Route a layer's floating-point ``outputs`` through an identity node, and return the node's outputs.

    ``probe`` requires gradients, so that a backward pass to it comes here; its visitor, if `visiting` names one, then
    gets ``saved`` and the output gradients, also under ``vmap`` over gradients. ``saved`` is kept by reference and
    checked for later modification. ``in_place`` passes outputs on without a copy; the operation that made them must not
    need them for its own backward pass.
    """
    saved = [t.detach() for t in saved]
    if in_place:
        outputs = [drop_view_base(t) for t in outputs]
    return list(_Tap.apply(len(outputs), in_place, *outputs, probe, *saved))
