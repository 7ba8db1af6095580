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

from fastgrad._torch import pytree, require_cpp_compiler
from fastgrad.engine.tracing import trace
from fastgrad.ops.conv.sqnorm import opaque_ops

#: Graphs kept. Inputs of ever new sizes are not worth a compilation each.
GRAPHS = 16

#: ``(*inputs) -> tensors``.
Pass = Callable[..., tuple[Tensor, ...]]
#: Of plain attributes, the types of what a forward pass may choose its path by.
_SWITCHES = frozenset((bool, int, float, str, type(None)))


class CompiledPasses:
    """Compiles a pass at its first call on inputs of a size, and calls what it compiled from then on.

    A graph reads the model's tensors where they lie, so steps of an optimizer and ``load_state_dict`` change what it
    computes; where tensors, modules, or numbers and names that modules hold were replaced, another one is compiled.
    What a forward pass takes from elsewhere is as it was at the first call.
    """

    def __init__(self) -> None:
        #: What their keys name by id stands beside the graphs, so that nothing else has that id.
        self._graphs: OrderedDict[Any, tuple[object, Callable[..., Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, model: nn.Module, structure: object, make: Callable[[], Pass], inputs: Any
    ) -> tuple[Tensor, ...]:
        """Compile or find the graph of a pass, and call it.

        ``structure`` stands for the model's modules and the structure of the inputs, by its identity. ``make`` gives
        the pass that is to be compiled, which uses nothing but the model and the inputs.
        """
        leaves = pytree.tree_leaves(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        switches = tuple(
            value for module in model.modules() for value in vars(module).values() if type(value) in _SWITCHES
        )
        looks = tuple(map(_look, leaves))
        key = (id(structure), cast, torch.get_num_threads(), switches, looks, *_places(model))
        with self._lock:
            if key not in self._graphs:
                if device == "cpu":
                    require_cpp_compiler("compile=True")
                function = make()
                with opaque_ops():
                    graph = trace(function, inputs, None)
                # Norms of convolutions gather from channels first.
                options: dict[str, Any] = {"layout_optimization": False}
                self._graphs[key] = structure, torch.compile(graph, dynamic=False, options=options)
            self._graphs.move_to_end(key)
            compiled = self._graphs[key][1]
            while len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        # The casts are in the graph.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            found: tuple[Tensor, ...] = compiled(*tensors)
        return found


def _look(leaf: object) -> object:
    """What of an input a graph depends on beyond the plan."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride())
    return repr(leaf)


def _places(model: nn.Module) -> Iterator[tuple[int, torch.dtype]]:
    """Where the tensors of a model lie."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            yield tensor.data_ptr(), tensor.dtype
