"""A rewrite of an ONNX graph that saves time by letting every Clip fuse with the convolution before it.

On a CPU, ONNX Runtime keeps images in blocks of channels as long as every operator between convolutions supports
blocks. Clip does not. It is free as the activation of the convolution before it, unless another node reads that
convolution's output. A node that reads only a grid of its positions gets its own convolution instead.
"""

from __future__ import annotations

import math
from typing import Any

#: With at most this many products per number of a map, computing a grid of its positions twice costs less than writing
#: the map for two readers, because an activation or a sum can then fuse with the convolution.
_MAX_PRODUCTS = 32


def subsample_convs(model: Any) -> None:
    """Give each grid of positions of a convolution's output a convolution that computes only the grid.

    A grid is a pooling with windows of one position. The ``onnx_ir.Model`` is changed in place.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    for node in model.graph:
        conv = node.inputs[0].producer() if node.op_type == "MaxPool" else None
        if conv is None or conv.op_type != "Conv" or (weight := conv.inputs[1].const_value) is None:
            continue
        steps = node.attributes["strides"].as_ints()
        # A pooling that also returns indices, as for a gradient, stays.
        single = set(node.attributes["kernel_shape"].as_ints()) == {1} and len(node.outputs) == 1
        rounded = "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int()
        if not single or rounded or math.prod(weight.shape[1:]) > _MAX_PRODUCTS * math.prod(steps):
            continue
        strides = [one * other for one, other in zip(conv.attributes["strides"].as_ints(), steps, strict=True)]
        attributes = {**conv.attributes, "strides": ir.AttrInt64s("strides", strides)}
        grid = ir.Node("", "Conv", conv.inputs, attributes.values(), name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [grid], node.outputs, grid.outputs)
    passes.RemoveUnusedNodesPass()(model)
