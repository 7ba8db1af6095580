"""A rewrite of an ONNX graph that lets ONNX Runtime stay in the layout its convolutions work in.

On a CPU it keeps images in blocks of channels as long as every operator between convolutions has a form for blocks.
Clip has none; it is free as the activation of the convolution before it, but not where something else wants that
convolution's own output. What wants no more of it than a grid of positions gets a convolution of its own.
"""

from __future__ import annotations

import math
from typing import Any

#: Products for each number of a map, up to which it costs less to compute a grid of its positions twice than to write
#: the map for two readers: an activation or a sum then joins the convolution that makes it.
_TWICE = 32


def sample_apart(graph: Any) -> None:
    """Give each grid of positions of a convolution's output a convolution that computes no more than the grid.

    Args:
        graph: An ``onnx.GraphProto``, changed in place; it computes the same numbers. A grid is a pooling of single
            positions; between it and the convolution may be sums and products of one constant a channel.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {initializer.name: list(initializer.dims) for initializer in graph.initializer}
    nodes: list[Any] = []

    def chain(name: str, axes: int) -> list[Any]:
        """The convolution that ``name`` comes from and what is done to it channel by channel; or nothing."""
        found: list[Any] = []
        while (node := makers.get(name)) is not None and node.op_type in ("Conv", "Mul", "Add"):
            found.insert(0, node)
            shape = constants.get(node.input[1], [])
            if node.op_type == "Conv":
                return found if shape else []
            if set(shape[-axes:]) != {1}:
                break
            name = node.input[0]
        return []

    for node in graph.node:
        ints = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        rounded = any(attribute.i for attribute in node.attribute if attribute.name == "ceil_mode")
        grid = node.op_type == "MaxPool" and set(ints["kernel_shape"]) == {1} and not rounded
        made = chain(node.input[0], len(ints["strides"])) if grid else []
        if not made or math.prod(constants[made[0].input[1]][1:]) > _TWICE * math.prod(ints["strides"]):
            nodes.append(node)
            continue
        for number, original in enumerate(made):
            copy = type(node)()
            copy.CopyFrom(original)
            copy.name = f"{node.name}_{number}"
            if number:
                copy.input[0] = nodes[-1].output[0]
            else:
                strides = next(attribute for attribute in copy.attribute if attribute.name == "strides")
                strides.ints[:] = [
                    one * other for one, other in zip(strides.ints, ints["strides"], strict=True)
                ]
            copy.output[0] = node.output[0] if original is made[-1] else f"{node.output[0]}_{number}"
            nodes.append(copy)
    # Without what nothing needs any more.
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
