"""The autograd graph behind outputs: the recorded calls it reaches, and the parameters it uses outside of them."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastgrad._torch import NODES_OF_SHARDS, number_of

#: Functions of scalars that pass on what a scalar is made of.
_SCALARS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "ToCopy", "Clone", "Alias", "View", "UnsafeView", "ReshapeAlias", "Squeeze",
     "Unsqueeze", "Stack", "Cat", "Select"}
)  # fmt: skip
_OURS = frozenset({"_TapBackward", "_GraphedBackward", "_ReturnedBackward"})
#: Nodes whose backward pass takes several gradients at once; tests try each. ``cdist``'s is wrong, without an error.
_BATCHED = _OURS | {
    f"{name}Backward"
    for name in re.findall(
        r"\w+",
        """Abs Acos Add Addmm Alias Amax Amin Asin AsStrided Atan AvgPool2D Baddbmm Bmm Cat Clamp ClampMin Clone
        ConstantPadNd Convolution Cos Cumsum Div Dot Elu Erf Exp Expand Flip Gather Gelu Glu Hardsigmoid
        Hardswish Hardtanh Index IndexSelect LeakyRelu Log Log1P LogSigmoid LogSoftmax Logsumexp MaskedFill Max
        MaxPool2DWithIndices Mean Mish Mm Mul Mv NativeBatchNorm NativeGroupNorm NativeLayerNorm Neg Permute Pow Prod
        Reciprocal Relu Repeat ReshapeAlias Roll Rsqrt Rsub Select Sigmoid Silu Sin Slice Softmax Softplus Split
        SplitWithSizes Sqrt Squeeze Stack Sub Sum T Tan Tanh Transpose Tril Triu Unbind Unfold UnsafeSplit UnsafeView
        Unsqueeze View Where ToCopy""",
    )
}


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


def no_view(tensor: Tensor) -> Tensor:
    """Return the same values as no view of another tensor; they share the memory of a contiguous one."""
    if not tensor.is_contiguous():
        return tensor.clone()
    alike: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return alike


def mark_returned(call: object, output: Tensor) -> Tensor:
    """Return an output whose node leads to the call; it shares the memory of a contiguous ``output``."""
    result: Tensor = _Returned.apply(call, no_view(output))
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
    """Return the calls that outputs reach, by id, and the ids of the leaves that they use outside of calls."""
    calls: dict[int, Any] = {}
    leaves: set[int] = set()
    for node in nodes(outputs):
        call = call_of(node)
        if call is not None:
            calls[id(call)] = call
        elif (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return calls, leaves


def mean_over_samples(outputs: Iterable[Tensor]) -> str:
    """Return the name of a mean over several rows in which a scalar among the outputs ends; empty if none does.

    It may be a term or a factor of the scalar.
    """
    waiting: list[Any] = [out.grad_fn for out in outputs if not out.dim()]
    while waiting:
        node = waiting.pop()
        if node is None or call_of(node) is not None:
            continue
        name = re.sub(r"Backward\d*$", "", type(node).__name__)
        sizes = getattr(node, "_saved_self_sym_sizes", ())
        if getattr(node, "_saved_reduction", None) == 1:
            sizes = node._saved_self.shape[:-1] if name == "NllLoss" else node._saved_self.shape
            if tuple(sizes[:1]) not in ((), (1,)):
                return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        if name == "Mean" and tuple(sizes[:1]) not in ((), (1,)):
            return "mean"
        following = [other for other, _ in node.next_functions]
        stacked = len(sizes) == 1 and all(type(other).__name__.startswith("Stack") for other in following)
        if name in _SCALARS or (name == "Sum" and (stacked or math.prod(sizes) == 1)):
            waiting += following
    return ""


@dataclass
class Walk:
    """What lies behind the outputs of a call."""

    #: Ids of leaves that nodes use whose numbers are in no range of recorded uses.
    untracked: set[int]
    #: The kinds of nodes.
    kinds: set[type]
    #: Nodes at which inputs enter, and results of earlier recorded calls.
    entries: list[Any]


def walk(outputs: Iterable[Tensor], numbers: list[tuple[int, int]], inputs: Iterable[Any], own: object) -> Walk:
    """Walk the graph behind the outputs of the call ``own``, up to the nodes that its ``inputs`` come from.

    ``numbers`` are ranges of the numbers of nodes whose use of parameters was recorded.
    """
    found = Walk(set(), set(), [])
    ranges = sorted(numbers)
    starts, ends = [first for first, _ in ranges], [last for _, last in ranges]
    waiting: list[Any] = [out.grad_fn for out in outputs]
    stops = set(inputs)
    seen: set[Any] = {None}
    kinds, untracked = found.kinds, found.untracked
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node)
        if node in stops or (kind.__name__ == "_ReturnedBackward" and node.call is not own):
            found.entries.append(node)
            continue
        kinds.add(kind)
        following = node.next_functions
        for other, _ in following:
            if type(other).__name__ == "AccumulateGrad":
                number = number_of(node)
                at = bisect_right(starts, number) - 1
                if at < 0 or number >= ends[at]:
                    untracked.add(id(other.variable))
            elif other not in seen:
                waiting.append(other)
    return found


def custom_function(kinds: Iterable[type]) -> bool:
    """Whether a custom ``autograd.Function`` is among nodes; its backward pass may do anything."""
    known = _OURS | NODES_OF_SHARDS
    return any(issubclass(kind, BackwardCFunction) and kind.__name__ not in known for kind in kinds)


def reentrant_checkpoint(kinds: Iterable[type]) -> bool:
    """Whether a checkpoint with ``use_reentrant=True`` is among nodes."""
    return any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds)


def batched_backward(kinds: Iterable[type]) -> bool:
    """Whether the backward passes of these nodes are known to take several gradients at once under ``vmap``."""
    return all(re.sub(r"\d*$", "", kind.__name__) in _BATCHED for kind in kinds)
