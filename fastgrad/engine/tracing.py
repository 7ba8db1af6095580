"""Passes compiled from flat graphs, and the sizes of a batch while such a graph is traced."""

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

#: Number of graphs kept. Inputs of ever new sizes are not worth a compilation each.
GRAPHS = 16

#: Types of plain attributes by which a forward pass may choose its path.
_SWITCHES = frozenset((bool, int, float, str, type(None)))


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def is_fixed(size: object) -> bool:
    """Whether a symbolic size has become a number: an operation had no form for every size."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None


class CompiledPasses:
    """Compiles a pass at its first call on inputs of a size, and calls what it compiled from then on.

    Pointwise operations are fused across layers, and Python's overhead for every layer is gone. The operators of norms
    stay opaque: at run time they choose their route and check where it would lose digits, as without compilation.

    A graph reads the model's tensors in place, so it follows steps of an optimizer and ``load_state_dict``. If tensors,
    modules, or numbers and strings that modules hold were replaced, another graph is compiled. Anything else that a
    forward pass reads stays as it was at the first call.
    """

    def __init__(self) -> None:
        #: Each graph is kept with the structure that its key names by id, so that nothing else gets that id.
        self._graphs: OrderedDict[Any, tuple[object, Callable[..., Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, model: nn.Module, structure: object, make: Callable[[], Callable[..., Any]], inputs: Any
    ) -> tuple[Tensor, ...]:
        """Compile or find the graph of the pass that ``make`` returns, which uses only model and inputs; call it.

        The identity of ``structure`` stands for the model's modules and the structure of the inputs.
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
                # Norms of convolutions gather patches from tensors with channels first.
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
