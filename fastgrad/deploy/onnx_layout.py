"""Rewrites of an ONNX graph that let ONNX Runtime stay in the layout its convolutions work in.

On a CPU it keeps images in blocks of channels as long as every operator between convolutions has a form for blocks.
Clip has none; it is free as the activation of the convolution before it, but not where something else, as the reading
of a channel's mean square, wants that convolution's own output.
"""

from __future__ import annotations

from collections import Counter
from typing import Any


def keep_blocked(graph: Any) -> None:
    """Give each Clip that cannot join a convolution one of its own, of one weight a channel, which is 1.

    Args:
        graph: An ``onnx.GraphProto``, changed in place; it computes the same numbers.
    """
    import numpy as np
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
    del graph.node[:]
    graph.node.extend(nodes)
