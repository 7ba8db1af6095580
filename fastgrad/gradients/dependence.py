"""Which recorded calls and which parameters outputs depend on; refusals of dependences without per-sample norms."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastgrad._torch import number_of
from fastgrad.engine.layout import Layout
from fastgrad.engine.probe import nodes_behind, nodes_by_term
from fastgrad.engine.run import Run


class Call(NamedTuple):
    """One recorded call."""

    keys: dict[str, int]  # ids of the recorded model's parameters by their names within the called module
    run: weakref.ref[Run]  # its probes; it lives as long as the graph of its outputs
    outputs: tuple[Layout | None, ...]  # where the batch lies in each output
    samples: int
    numbers: range  # of the operations in its graph; empty for an empty batch
    tried: range  # of the operations of earlier passes that planned it


def require_plain(
    outputs: Sequence[Tensor], names: Mapping[int, str], taps: Container[int], transformed: Sequence[range]
) -> None:
    """Raise ValueError if ``outputs`` reach one of these parameters through a call that ``torch.func`` transforms.

    It counts whether the call uses the parameter or was given values computed from it. Values from recorded calls do
    not count; the search ends at the ``taps`` of these.
    """
    nodes = sorted(nodes_behind(outputs), key=number_of) if transformed else []
    numbers, inside = [number_of(node) for node in nodes], []
    for part in transformed:
        inside += nodes[bisect_left(numbers, part.start) : bisect_left(numbers, part.stop)]
    for node in nodes_behind(inside, taps):
        if used := names.keys() & _leaves(node):
            raise ValueError(
                f"outputs must depend on {names[used.pop()]!r} through ordinary calls of the recorded model; they "
                "reach it in a call that torch.func transforms (vmap, jacrev). Make that in the forward of a module of "
                "your own, and record this"
            )


def require_returned(
    outputs: Sequence[Tensor], names: Mapping[int, str], taps: Container[int], calls: Sequence[Call]
) -> None:
    """Raise ValueError if ``outputs`` reach one of these parameters in a call, not through a recomputed module's tap.

    Operations outside of calls, as for a weight decay, have other sequence numbers.
    """
    inside = _uses(nodes_behind(outputs, taps), calls)[1] & names.keys() if names else set()
    if inside:
        raise ValueError(
            f"outputs must depend on {names[min(inside, key=list(names).index)]!r} through what the "
            "recorded model returns: real tensors, also in tuples, lists and dicts. They reach it in "
            "another way (an attribute, a hook, a complex tensor, an object, a gradient with create_graph=True), "
            "where its gradients per sample are not seen"
        )


def require_called(
    outputs: Sequence[Tensor], names: Mapping[int, str], calls: Sequence[Call], *, empty: bool
) -> set[int]:
    """Return the batch sizes of the calls that ``outputs`` reach.

    Raise RuntimeError if they reach none, unless the batch is ``empty``, which shows none. Raise ValueError if a term
    of the outputs reaches both a call and, outside of calls, one of these parameters. A term without calls, as a weight
    decay, is allowed, because it has no gradient per sample.
    """
    sizes, _, beside = _uses(nodes_behind(outputs), calls)
    if not sizes and not empty:
        raise RuntimeError("outputs must be computed from calls of the recorded model; they reach none")
    for nodes in nodes_by_term(outputs) if beside & names.keys() else ():
        called, _, beside = _uses(nodes, calls)
        if called and (beside := beside & names.keys()):
            raise ValueError(
                f"outputs must depend on {names[min(beside, key=list(names).index)]!r} through calls of the "
                "recorded model or of its modules alone; it is used outside of them as well, as in another method than "
                "forward. Call that from the forward of a module of your own, and record this"
            )
    return sizes


def _uses(nodes: Iterable[Any], calls: Sequence[Call]) -> tuple[set[int], set[int], set[int]]:
    """Return batch sizes of the calls that ``nodes`` belong to, and ids of parameters used in calls and outside."""
    sizes: set[int] = set()
    inside: set[int] = set()
    beside: set[int] = set()
    for node in nodes:
        leaves = _leaves(node)
        # Nodes from other threads, as of a loss, may have the same numbers, but seldom use a parameter.
        if leaves and any(number_of(node) in call.tried for call in calls):
            raise ValueError(
                "outputs must be computed from what the recorded call itself gave; they reach an earlier pass, which a "
                "first call makes to be planned, as through a list that a hook adds to. Keep the latest alone"
            )
        called = {call.samples for call in calls if number_of(node) in call.numbers}
        sizes |= called
        used = inside if called else beside
        used |= leaves
    return sizes, inside, beside


def _leaves(node: Any) -> set[int]:
    """Return the ids of the leaves, as parameters, that a node of the graph uses."""
    return {id(getattr(following, "variable", None)) for following, _ in node.next_functions} - {id(None)}
