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
            positions.
    """
    makers = {name: node for node in graph.node if node.op_type == "Conv" for name in node.output}
    shapes = {initializer.name: initializer.dims for initializer in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        ints = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        rounded = any(attribute.i for attribute in node.attribute if attribute.name == "ceil_mode")
        grid = node.op_type == "MaxPool" and set(ints["kernel_shape"]) == {1} and not rounded
        conv = makers.get(node.input[0]) if grid else None
        weight = shapes.get(conv.input[1]) if conv is not None else None
        if conv is None or not weight or math.prod(weight[1:]) > _TWICE * math.prod(ints["strides"]):
            nodes.append(node)
            continue
        copy = type(node)()
        copy.CopyFrom(conv)
        copy.name, copy.output[0] = node.name, node.output[0]
        strides = next(attribute for attribute in copy.attribute if attribute.name == "strides")
        strides.ints[:] = [one * other for one, other in zip(strides.ints, ints["strides"], strict=True)]
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
