"""Passes compiled from flat graphs, and the sizes of a batch while such a graph is recorded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import flat_graph, pytree, require_cpp_compiler
from fastgrad.batches import input_tensors
from fastgrad.ops.dispatch import bind_contextvar, opaque_ops

#: Graphs kept. Inputs of ever new sizes are not worth a compilation each.
GRAPHS = 16

#: Of plain attributes, the types of what a forward pass may choose its path by.
_SWITCHES = frozenset((bool, int, float, str, type(None)))


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def is_fixed(size: object) -> bool:
    """Whether a symbolic size has become a number: an operation had no form for every size."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None


class CompiledPasses:
    """Compiles a pass at its first call on inputs of a size, and calls what it compiled from then on.

    What is pointwise is fused across layers and Python's part of every layer is gone. The operators of norms stay
    whole: at run time they choose their route and see where one would lose digits, as they do without compilation.

    A graph reads the model's tensors where they lie, so steps of an optimizer and ``load_state_dict`` change what it
    computes; where tensors, modules, or numbers and names that modules hold were replaced, another one is compiled.
    What a forward pass takes from elsewhere is as it was at the first call.
    """

    def __init__(self) -> None:
        #: What their keys name by id stands beside the graphs, so that nothing else has that id.
        self._graphs: OrderedDict[Any, tuple[object, Callable[..., Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, model: nn.Module, structure: object, make: Callable[[], Callable[..., Any]], inputs: Any
    ) -> tuple[Tensor, ...]:
        """Compile or find the graph of the pass that ``make`` gives, which uses nothing but model and inputs; call it.

        ``structure`` stands for the model's modules and the structure of the inputs, by its identity.
        """
        tensors = input_tensors(inputs)
        device = tensors[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        switches = tuple(
            value for module in model.modules() for value in vars(module).values() if type(value) in _SWITCHES
        )
        looks = tuple(
            (tuple(leaf.shape), leaf.stride()) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in pytree.tree_leaves(inputs)
        )
        places = tuple((tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers()))
        key = (id(structure), cast, torch.get_num_threads(), switches, looks, places)
        with self._lock:
            if key not in self._graphs:
                if device == "cpu":
                    require_cpp_compiler("compile=True")
                function = make()
                with bind_contextvar(opaque_ops, True):
                    graph = flat_graph(function, inputs, None)
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
