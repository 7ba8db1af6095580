"""An identity node whose backward pass returns squared norms as the gradient of a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import drop_view_base
from fastgrad.ops.dispatch import full_precision

#: ``(saved tensors, output gradients) -> (B, m)`` squared norms.
Norms = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

# Names of the graph nodes of sums, and of copies and products with a constant.
_SUMS, _FACTORS = frozenset({"Add", "Sub"}), frozenset({"Mul", "Div", "Neg", "ToCopy"})
# Ids of the probes whose gradients backward passes under way ask for. A pass to an early probe crosses the nodes of
# later ones, and autograd does not tell a node which of its inputs' gradients are wanted.
_requested: set[int] = set()


@contextlib.contextmanager
def requesting_norms(probes: Iterable[Tensor]) -> Iterator[None]:
    """Have backward passes in this context compute the norms of these probes, and of no others."""
    ids = {id(probe) for probe in probes}
    _requested.update(ids)
    try:
        yield
    finally:
        _requested.difference_update(ids)


class _Tap(torch.autograd.Function):
    """``outputs -> outputs``; ``backward`` passes the gradients on and returns squared norms for the probe."""

    @staticmethod
    def forward(ctx: Any, norms: Norms, count: int, in_place: bool, *tensors: Tensor) -> Any:
        # The outputs come first: if a node modifies a view, autograd assumes that its first input is this view.
        outputs, probe, saved = tensors[:count], tensors[count], tensors[count + 1 :]
        ctx.norms, ctx.probe, ctx.saved_count = norms, probe, len(saved)
        ctx.save_for_backward(*saved)
        if in_place:
            # Returned as if modified in place: neither a copy nor a view, so a later activation may overwrite it.
            ctx.mark_dirty(*outputs)
        else:
            outputs = tuple(output.clone() for output in outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        norms = None
        with full_precision(gradients[0].device):
            if id(ctx.probe) in _requested:
                norms = ctx.norms(ctx.saved_tensors, gradients)
        if torch.is_grad_enabled():
            gradients = _Graphed.apply(ctx.probe, *gradients)
        return (None, None, None, *gradients, norms, *[None] * ctx.saved_count)


class _Graphed(torch.autograd.Function):
    """``gradients -> gradients`` of a backward pass with a graph; no probe sees what layers do in that graph."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, *gradients: Tensor) -> Any:
        ctx.probe = probe
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if id(ctx.probe) in _requested:
            raise ValueError(
                "outputs must not be computed from gradients that passed the recorded model (create_graph=True, as for "
                "a gradient penalty): its layers then have a part in them of which no gradient per sample is known. "
                "Take these gradients in the forward of a module of your own, and record this"
            )
        return None, *gradients


def tap(
    outputs: Sequence[Tensor], saved: Sequence[Tensor], probe: Tensor, norms: Norms, *, in_place: bool
) -> list[Tensor]:
    """Route a layer's floating-point ``outputs`` through an identity node, and return the node's outputs.

    ``probe`` holds zeros ``(B, m)`` that require gradients. Its gradient is the squared norms, if a backward pass asks
    for them (`requesting_norms`). ``norms`` computes them from ``saved`` and the output gradients, also under ``vmap``
    over gradients. ``saved`` is kept by reference and checked for later modification. ``in_place`` passes outputs on
    without a copy; the operation that made them must not need them for its own backward.
    """
    saved = [t.detach() for t in saved]
    if in_place:
        outputs = [drop_view_base(t) for t in outputs]
    return list(_Tap.apply(norms, len(outputs), in_place, *outputs, probe, *saved))


def nodes_behind(outputs: Iterable[Any], stops: Container[int] = ()) -> Iterator[Any]:
    """Yield the nodes of the graph of ``outputs`` (tensors or nodes), up to taps of probes with ids in ``stops``."""
    waiting: list[Any] = [out.grad_fn if isinstance(out, Tensor) else out for out in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or (node.name() == f"{_Tap.__name__}Backward" and id(node.probe) in stops):
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def nodes_by_term(outputs: Iterable[Tensor]) -> Iterator[Iterator[Any]]:
    """Yield the nodes behind each term of outputs that are sums of scalars, as of a loss and a weight decay."""
    waiting: list[tuple[Any, bool]] = [(out.grad_fn, not out.dim()) for out in outputs]
    while waiting:
        node, number = waiting.pop()
        terms = [] if node is None else [other for other, _ in node.next_functions if other is not None]
        # These return a scalar only if all their arguments are scalars.
        if number and terms and node.name().removesuffix("Backward0") in (_SUMS if terms[1:] else _SUMS | _FACTORS):
            waiting += [(other, True) for other in terms]
        else:
            yield nodes_behind([node])
