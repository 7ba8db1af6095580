"""Tracing an extraction to one flat graph with a dynamic batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import flat_graph, pytree


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def trace(function: Callable[[Any, Any], Any], args: Any, kwargs: Any, samples: int) -> torch.fx.GraphModule:
    """Trace ``function(args, kwargs)``, batch dynamic, to a graph that takes the inputs' tensors.

    Args:
        function: What to trace.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        samples: Size of dimension 0 which marks a tensor as one that carries the batch.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]

    def flat(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(*pytree.tree_unflatten(filled, spec))

    return flat_graph(flat, tensors, [t.dim() > 0 and t.shape[0] == samples for t in tensors])
