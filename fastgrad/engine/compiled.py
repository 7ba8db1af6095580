"""Passes compiled by ``torch.compile``: the flat graph of one, backward pass included, for each size of the inputs.

What is pointwise is fused across layers and Python's part of every layer is gone. The operators of norms stay whole: at
run time they choose their route and see where one would lose digits, as they do without compilation.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import find_cpp_compiler, pytree
from fastgrad.engine.tracing import trace
from fastgrad.ops.layer_sqnorm import kept_whole

#: Graphs kept. Inputs of ever new sizes are not worth a compilation each.
GRAPHS = 16

#: ``(args, kwargs) -> tensors``.
Pass = Callable[[Any, Any], tuple[Tensor, ...]]


class CompiledPasses:
    """Compiles a pass at its first call on inputs of a size, and calls what it compiled from then on.

    A graph reads the model's tensors where they lie, so steps of an optimizer and ``load_state_dict`` change what it
    computes; where tensors were replaced, another one is compiled.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, model: nn.Module, function: Pass, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """``function(args, kwargs)``, which is to use nothing but ``model`` and its arguments."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (str(spec), cast, torch.get_num_threads(), *map(_look, leaves), *_places(model))
        with self._lock:
            if key not in self._graphs:
                if device == "cpu":
                    find_cpp_compiler()
                with kept_whole():
                    graph = trace(function, (args, kwargs), None)
                # Norms of convolutions gather from channels first.
                options: dict[str, Any] = {"layout_optimization": False}
                self._graphs[key] = torch.compile(graph, dynamic=False, options=options)
            self._graphs.move_to_end(key)
            compiled = self._graphs[key]
            while len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        # The casts are in the graph.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            found: tuple[Tensor, ...] = compiled(*tensors)
        return found


def _look(leaf: object) -> object:
    """What of an input a graph depends on."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return repr(leaf)


def _places(model: nn.Module) -> Iterator[tuple[int, torch.dtype]]:
    """Where the tensors of a model lie."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            yield tensor.data_ptr(), tensor.dtype
