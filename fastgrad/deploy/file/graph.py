"""A module's computation, backward pass included, as one flat graph for any batch size.

The function is recorded once (`flat_graph`). The batch may be a symbol, so that every operation works on the whole
batch. Or the graph is recorded for one input, and a loop in the exported program takes the inputs one after
another. On a CPU the loop is faster for whole-network gradients of large inputs: the gradients of one input fill the
caches by themselves and need no grouped form. ResNet-18 at 224 x 224 takes half the time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import flat_graph, storage_key, while_loop
from fastgrad.checks import without_warnings

#: If the operations for one input write more bytes than this, the loop is faster.
LOOP_BYTES = 32 << 20


def trace(
    function: Callable[[Tensor], Any], example_input: Tensor, *, max_batch: int = 1024, one_by_one: bool | None = None
) -> Any:
    """Unroll ``function`` with its backward pass; return a `torch.export.ExportedProgram` of dynamic batch.

    It maps a tensor ``(B, ...)`` like ``example_input`` to a tuple of tensors with B rows; a row depends on its input
    alone. ``one_by_one`` says whether a loop takes the inputs one after another; None chooses the faster form.

    RuntimeError if the graph depends on the batch size.
    """
    one = example_input.detach()[:1].contiguous()
    batch = one.expand(3, *one.shape[1:]).contiguous()
    with without_warnings():
        if one_by_one or (one_by_one is None and one.device.type == "cpu"):
            # A loop's body may not write in place.
            single = _share_constants(flat_graph(function, (one,), None, functional=True))
            backward = any("backward" in str(node.target) for node in single.graph.nodes)
            if one_by_one or (backward and written(single) > LOOP_BYTES):
                return _export(_Loop(single, one), batch, max_batch)
        try:
            return _export(flat_graph(function, (batch,), 3), batch, max_batch)
        except Exception as error:
            if re.search("constraint|speciali|concrete integer", str(error), re.IGNORECASE):
                raise RuntimeError(
                    "the model's computation depends on the batch size, or has an operation that PyTorch has for fixed "
                    "sizes alone, so it has no graph for every size. Take the size as x.shape[0], without int(), len() "
                    "or a loop over x; a .pt2 can be exported with one_by_one=True"
                ) from error
            raise


def written(graph: torch.fx.GraphModule) -> int:
    """Return the bytes of all operations' results, views not counted."""
    sizes: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(value := node.meta.get("val"), Tensor):
            sizes.setdefault(storage_key(value), value.numel() * value.element_size())
    return sum(sizes.values())


def _share_constants(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return the graph with each constant as one attribute with memory of its own, as a loop's body needs."""
    names: dict[Any, str] = {}
    memory: set[int] = set()
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if key in names:
            node.target = names[key]
            continue
        names[key] = node.target
        if value.untyped_storage().data_ptr() in memory:
            copy = value.detach().clone()
            setattr(graph, node.target, nn.Parameter(copy) if isinstance(value, nn.Parameter) else copy)
        memory.add(value.untyped_storage().data_ptr())
    graph.graph.eliminate_dead_code()
    # The new module holds only the attributes that the graph uses.
    return torch.fx.GraphModule(graph, graph.graph)


class _Loop(nn.Module):
    """Runs a graph for one input on the inputs of a batch, one after another."""

    def __init__(self, graph: torch.fx.GraphModule, one: Tensor) -> None:
        super().__init__()
        self.body = graph
        with torch.no_grad():
            self.rows = [(value.shape[1:], value.dtype) for value in graph(one)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        start = torch.zeros((), dtype=torch.int64, device="cpu")
        results = [x.new_zeros((x.shape[0], *shape), dtype=dtype) for shape, dtype in self.rows]

        def more(i: Tensor, *results: Tensor) -> Tensor:
            return i < results[0].shape[0]

        def step(i: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
            index = i.view(1)
            rows = self.body(x.index_select(0, index))
            return (i + 1, *(all_.index_copy(0, index, new) for all_, new in zip(results, rows, strict=True)))

        return while_loop(more, step, (start, *results))[1:]


def _export(graph: nn.Module, batch: Tensor, max_batch: int) -> Any:
    # The size of the batch that is recorded must be an allowed one.
    size = torch.export.Dim("batch", min=1, max=max(max_batch, len(batch)))
    return torch.export.export(graph, (batch,), dynamic_shapes=({0: size},))
