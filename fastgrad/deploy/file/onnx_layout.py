"""Rewrites of an ONNX graph that let ONNX Runtime stay in the layout its convolutions work in.

On a CPU it keeps images in blocks of channels as long as every operator between convolutions has a form for blocks.
Clip has none; it is free as the activation of the convolution before it, but not where something else, as the reading
of a channel's mean square, wants that convolution's own output. What wants no more of it than a grid of positions gets
a convolution of its own. Readings of many layers stay in blocks until they are side by side: an operator has its price
however little it works on.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from itertools import groupby
from typing import Any

import numpy as np

#: Products for each number of a map, up to which it costs less to compute a grid of its positions twice than to write
#: the map for two readers: an activation or a sum then joins the convolution that makes it.
_TWICE = 32
#: Channels of a block.
_BLOCK = 16


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
    _replace(graph, nodes)


def keep_blocked(graph: Any) -> None:
    """Give each Clip that cannot join a convolution one of its own, of one weight a channel, which is 1.

    Args:
        graph: An ``onnx.GraphProto``, changed in place; it computes the same numbers.
    """
    from onnx import TensorProto, helper, numpy_helper

    uses = Counter(name for node in graph.node for name in node.input)
    types = {value.name: value.type.tensor_type for value in graph.value_info}
    nodes = []
    for node in graph.node:
        read: str = node.input[0] if node.op_type == "Clip" else ""
        if read in types and uses[read] > 1 and types[read].elem_type == TensorProto.FLOAT:
            shape = [dim.dim_value for dim in types[read].shape.dim]
            if len(shape) == 4 and shape[1]:
                ones, same = f"{node.output[0]}_ones", f"{node.output[0]}_same"
                weight = numpy_helper.from_array(np.ones((shape[1], 1, 1, 1), np.float32), ones)
                graph.initializer.append(weight)
                nodes.append(helper.make_node("Conv", [read, ones], [same], group=shape[1]))
                node.input[0] = same
        nodes.append(node)
    _replace(graph, nodes)


def join_means(graph: Any) -> None:
    """Put sums and means of channels side by side as poolings leave them; what is left to do is done for all at once.

    Args:
        graph: An ``onnx.GraphProto``, changed in place. A sum over T positions is stated as a pooling times T, a mean
            as that over T, and becomes the pooling; one of squares inside the border, a pooling of all windows of that
            size, of which the last is it: cut before, the map would leave its blocks.
    """
    from onnx import helper, numpy_helper

    makers = {name: node for node in graph.node for name in node.output}
    # Scalars, and the bounds of slices.
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) < 2}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    nodes: list[Any] = []

    def constant(name: str, values: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    @functools.cache
    def pooling(name: str) -> tuple[str, float]:
        """The pooling ``(B, C, 1, 1)`` of which ``name`` ``(B, C)`` is a multiple, and the multiple; or nothing."""
        times, over, value = 1.0, 1.0, name
        while (node := makers.get(value)) is not None and node.op_type != "AveragePool":
            scalar = len(node.input) > 1 and constants.get(node.input[1], np.empty(1)).ndim == 0
            if node.op_type == "Mul" and scalar:
                times *= constants[node.input[1]].item()
            elif node.op_type == "Div" and scalar:
                over *= constants[node.input[1]].item()
            elif node.op_type != "Squeeze":
                return "", 1.0
            value = node.input[0]
        flat = len(shapes.get(name, ())) == 2 and shapes.get(value, [])[2:] == [1, 1]
        return (value, times / over) if node is not None and flat else ("", 1.0)

    @functools.cache
    def inside(name: str) -> str:
        """The map ``(B, C, H, W)`` of whose squares, the first of both axes left out, it is the mean; or nothing."""
        square = makers.get(makers[name].input[0])
        if square is None or square.op_type != "Mul" or square.input[0] != square.input[1]:
            return ""
        value, axes = square.input[0], []
        while (node := makers.get(value)) is not None and node.op_type == "Slice":
            start, end, axis, step = (constants.get(i, np.zeros(1)).tolist() for i in node.input[1:])
            if (start, step) != ([1], [1]) or end[0] < 2**31 - 1:
                return ""
            axes += axis
            value = node.input[0]
        return value if sorted(axes) == [2, 3] else ""

    def kind(name: str) -> tuple[bool, bool, bool]:
        """Poolings of one kind are joined: those of channels that fill their blocks, of a whole map or its inside."""
        value = pooling(name)[0]
        return bool(value), bool(value) and bool(inside(value)), bool(value) and not shapes[value][1] % _BLOCK

    def windows(name: str) -> str:
        """The squares' means over all windows of the size of the inside, ``(B, C, 2, 2)``."""
        value, squares, means = inside(name), f"{name}_squares", f"{name}_windows"
        kernel = next(list(a.ints) for a in makers[name].attribute if a.name == "kernel_shape")
        nodes.append(helper.make_node("Mul", [value, value], [squares]))
        nodes.append(helper.make_node("AveragePool", [squares], [means], kernel_shape=kernel))
        return means

    def joined(names: list[str], result: str, cut: bool) -> str:
        found = [pooling(name) for name in names]
        four, flat = f"{result}_pooled", f"{result}_flat"
        axes = constant(f"{result}_space", np.array([2, 3]))
        parts = [windows(value) if cut else value for value, _ in found]
        nodes.append(helper.make_node("Concat", parts, [four], axis=1))
        if cut:
            bounds = [constant(f"{result}_{i}", np.full(2, i)) for i in (1, 2)]
            nodes.append(helper.make_node("Slice", [four, *bounds, axes], [f"{four}_last"]))
            four = f"{four}_last"
        nodes.append(helper.make_node("Squeeze", [four, axes], [flat]))
        row = np.concatenate([np.full(shapes[value][1], factor, np.float32) for value, factor in found])
        if (row == 1).all():
            return flat
        nodes.append(helper.make_node("Mul", [flat, constant(f"{result}_factors", row)], [result]))
        return result

    for node in graph.node:
        if node.op_type == "Concat" and node.attribute[0].i == 1:
            inputs: list[str] = []
            for (pooled, cut, _), run in groupby(node.input, kind):
                names = list(run)
                several = pooled and len(names) > 1
                inputs += [joined(names, f"{node.output[0]}_{len(inputs)}", cut)] if several else names
            del node.input[:]
            node.input.extend(inputs)
        nodes.append(node)
    _replace(graph, nodes)


def _replace(graph: Any, nodes: list[Any]) -> None:
    """Make these the graph's nodes, without those that nothing needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    numbers = [number for number in graph.initializer if number.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(numbers)
