"""Recording a function, backward pass included, as one flat graph of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import flat_graph, pytree
from fastgrad.batches import input_tensors


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def is_fixed(size: object) -> bool:
    """Whether a symbolic size has become a number: an operation had no form for every size."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None


def trace(
    function: Callable[..., Any], inputs: Any, batch: int | None, *, functional: bool = False
) -> torch.fx.GraphModule:
    """Run ``function(*inputs)`` once on tensors without data and record every operation.

    Operations of `torch.autograd.grad` inside the function are recorded like all others.

    Args:
        function: What to record.
        inputs: Tuple of example inputs of any structure.
        batch: Size of dimension 0 that marks a tensor as one that carries the batch, whose size becomes a symbol;
            at least 2, since sizes 0 and 1 are special to the tracer. None records constant sizes.
        functional: Whether operations that write in place become ones that do not.

    Returns:
        A module that takes the inputs' tensors positionally.
    """

    def flat(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*pytree.tree_map_only(Tensor, lambda _: next(given), inputs))

    tensors = input_tensors(inputs)
    carries = [tensor.dim() > 0 and tensor.shape[0] == batch for tensor in tensors]
    return flat_graph(flat, tensors, carries, functional=functional)
