"""Rewrites of an ONNX graph for the same computation in less time.

`optimize` does what onnxscript's own does, except for one pattern, two slices that are a split. The search for it goes
through all nodes for each node: for the ten thousand nodes of a large network's backward pass, it takes most of an
hour.

`sample_apart` lets ONNX Runtime stay in the layout its convolutions work in. On a CPU it keeps images in blocks of
channels as long as every operator between convolutions has a form for blocks. Clip has none. It is free as the
activation of the convolution before it, unless another node reads that convolution's own output. A node that reads only
a grid of its positions gets a convolution of its own.
"""

from __future__ import annotations

import math
from typing import Any

#: By their names in ``onnxscript.rewriter.rules.common``.
_RULES = (
    "add_0_rule", "sub_0_rule", "mul_by_1_rule", "div_by_1_rule", "cast_cast_rule", "no_op_cast_rule",
    "no_op_expand_rule", "no_op_transpose_rule", "transpose_transpose_rule", "unsqueeze_unsqueeze_rule",
    "reshape_reshape_rule", "flatten_to_reshape_rule", "squeeze_reshape_1d_rule", "collapse_slice_rule",
    "collapse_slice2_rule", "min_max_rule", "max_min_rule", "successive_clip_rule", "successive_clip_relu_rule",
    "successive_relu_clip_rule", "normalize_pad_format_conv_rule", "fuse_pad_into_conv_rule",
    "fuse_batchnorm_into_conv_rule", "remove_optional_bias_from_conv_rule", "remove_optional_bias_from_gemm_rule",
    "materialize_reshape_shape_rule",
)  # fmt: skip
#: Rounds of optimization: a constant found in one may let a rule apply in the next.
_TURNS = 2
#: Up to this many products for each number of a map, computing a grid of positions twice costs less than writing the
#: map for two readers: an activation or a sum can then fuse with the convolution.
_TWICE = 32


def optimize(model: Any) -> None:
    """Fold constants, apply rules and join equal nodes of an ``onnx_ir.Model``, in place."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common

    rules = [getattr(common, name) for name in _RULES]
    passes.InlinePass()(model)
    for _ in range(_TURNS):
        optimizer.fold_constants(model)
        rewrite(model, rules)
        passes.RemoveUnusedNodesPass()(model)
    for last in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        last(model)


def sample_apart(model: Any) -> None:
    """Give each grid of positions of a convolution's output a convolution that computes only the grid.

    A grid is a pooling with windows of one position; the ``onnx_ir.Model`` is changed in place.
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
        if not single or rounded or math.prod(weight.shape[1:]) > _TWICE * math.prod(steps):
            continue
        strides = [one * other for one, other in zip(conv.attributes["strides"].as_ints(), steps, strict=True)]
        attributes = {**conv.attributes, "strides": ir.AttrInt64s("strides", strides)}
        apart = ir.Node("", "Conv", conv.inputs, attributes.values(), name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [apart], node.outputs, apart.outputs)
    passes.RemoveUnusedNodesPass()(model)
