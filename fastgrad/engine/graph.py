"""The autograd graph behind outputs: the recorded calls it reaches, and the parameters it uses outside of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastgrad._torch import number_of

# Names of the graph nodes of sums, and of copies and products with a constant.
_SUMS, _FACTORS = frozenset({"Add", "Sub"}), frozenset({"Mul", "Div", "Neg", "ToCopy"})

_OURS = frozenset({"_TapBackward", "_GraphedBackward", "_ReturnedBackward", "_MixedBackward"})


class _Returned(torch.autograd.Function):
    """``x -> x``: a node that keeps the recorded call alive as long as the graph of its output."""

    @staticmethod
    def forward(ctx: Any, call: object, x: Tensor) -> Tensor:
        ctx.call = call
        # Neither a copy nor a view, so that the user's own operations may overwrite it.
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient


def mark_returned(call: object, output: Tensor) -> Tensor:
    """Return an output whose node leads to the call; it shares the memory of a contiguous ``output``."""
    own = torch.ops.aten._unsafe_view.default(output, output.shape) if output.is_contiguous() else output.clone()
    result: Tensor = _Returned.apply(call, own)
    return result


class _Mixed(torch.autograd.Function):
    """An output that joins samples: it has a value but no gradient per sample."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str, anchor: Tensor) -> Tensor:
        ctx.output = name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise _joined(ctx)


def _joined(node: Any) -> ValueError:
    return ValueError(
        f"outputs must not depend on {node.output} of the recorded model, which joins the samples of the batch, so "
        "that no gradient per sample is known; compute it from the other outputs"
    )


def mixed(value: Tensor, name: str) -> Tensor:
    """Return an output that joins samples, from which no gradient may be taken."""
    result: Tensor = _Mixed.apply(value, name, value.new_zeros((), requires_grad=True))
    return result


def call_of(node: Any) -> Any:
    """Return the recorded call whose output this node is, or None."""
    return node.call if type(node).__name__ == "_ReturnedBackward" else None


def nodes(outputs: Iterable[Any], *, inside: bool = False, stops: Iterable[Any] = ()) -> Iterator[Any]:
    """Yield the nodes of the graph of ``outputs`` (tensors or nodes), up to ``stops``.

    Nodes within recorded calls are left out unless ``inside`` is True.
    """
    waiting: list[Any] = [out.grad_fn if isinstance(out, Tensor) else out for out in outputs]
    seen = set(stops)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        call = None if inside else call_of(node)
        waiting += [following for following, _ in node.next_functions] if call is None else call.inputs


def calls_and_leaves(outputs: Iterable[Any]) -> tuple[dict[int, Any], set[int]]:
    """Return the calls that outputs reach, by id, and the ids of the leaves that they use outside of calls.

    ValueError if they reach an output that joins samples.
    """
    calls: dict[int, Any] = {}
    leaves: set[int] = set()
    for node in nodes(outputs):
        call = call_of(node)
        if type(node).__name__ == "_MixedBackward":
            raise _joined(node)
        if call is not None:
            calls[id(call)] = call
        elif (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return calls, leaves


def terms(outputs: Iterable[Tensor]) -> Iterator[list[Any]]:
    """Yield the node of each term of outputs that are sums of scalars, such as a loss and a weight decay."""
    waiting: list[tuple[Any, bool]] = [(out.grad_fn, not out.dim()) for out in outputs]
    while waiting:
        node, number = waiting.pop()
        parts = [] if node is None else [other for other, _ in node.next_functions if other is not None]
        # These return a scalar only if all their arguments are scalars.
        kinds = _SUMS if len(parts) > 1 else _SUMS | _FACTORS
        if number and parts and call_of(node) is None and type(node).__name__.removesuffix("Backward0") in kinds:
            waiting += [(other, True) for other in parts]
        else:
            yield [node]


def untracked(outputs: Iterable[Tensor], numbers: list[tuple[int, int]], inputs: Iterable[Any]) -> set[int]:
    """Return the ids of leaves that nodes behind a call's outputs use, numbered in none of these ranges.

    The nodes that its ``inputs`` come from do not count.
    """
    found: set[int] = set()
    ranges = sorted(numbers)
    for node in nodes(outputs, inside=True, stops=inputs):
        leaves = {id(other.variable) for other, _ in node.next_functions if hasattr(other, "variable")}
        if leaves and not _within(number_of(node), ranges):
            found |= leaves
    return found


def _within(number: int, ranges: list[tuple[int, int]]) -> bool:
    at = bisect_right(ranges, number, key=lambda each: each[0]) - 1
    return at >= 0 and number < ranges[at][1]


def has_custom_function(outputs: Iterable[Tensor]) -> bool:
    """Whether a custom ``autograd.Function`` lies behind outputs; its backward pass may do anything."""
    kinds = (type(node) for node in nodes(outputs, inside=True))
    return any(issubclass(kind, BackwardCFunction) and kind.__name__ not in _OURS for kind in kinds)
