"""Rewrites of an ONNX graph for the same computation in less time.

`optimize` is what onnxscript's own does, without one pattern, two slices that are a split. That is looked for by going
through all nodes for each node: of the ten thousand nodes that a large network's backward pass has, that takes most of
an hour.

`sample_apart` lets ONNX Runtime stay in the layout its convolutions work in. On a CPU it keeps images in blocks of
channels as long as every operator between convolutions has a form for blocks. Clip has none; it is free as the
activation of the convolution before it, but not where something else wants that convolution's own output. What wants no
more of it than a grid of positions gets a convolution of its own.
"""

from __future__ import annotations

import math
from typing import Any

#: By their names in ``onnxscript.rewriter.rules.common``; an older one lacks the last.
_RULES = (
    "add_0_rule", "sub_0_rule", "mul_by_1_rule", "div_by_1_rule", "cast_cast_rule", "no_op_cast_rule",
    "no_op_expand_rule", "no_op_transpose_rule", "transpose_transpose_rule", "unsqueeze_unsqueeze_rule",
    "reshape_reshape_rule", "flatten_to_reshape_rule", "squeeze_reshape_1d_rule", "collapse_slice_rule",
    "collapse_slice2_rule", "min_max_rule", "max_min_rule", "successive_clip_rule", "successive_clip_relu_rule",
    "successive_relu_clip_rule", "normalize_pad_format_conv_rule", "fuse_pad_into_conv_rule",
    "fuse_batchnorm_into_conv_rule", "remove_optional_bias_from_conv_rule", "remove_optional_bias_from_gemm_rule",
    "materialize_reshape_shape_rule",
)  # fmt: skip
#: A constant found by one turn lets a rule apply in the next.
_TURNS = 2
#: Products for each number of a map, up to which it costs less to compute a grid of its positions twice than to write
#: the map for two readers: an activation or a sum then joins the convolution that makes it.
_TWICE = 32


def optimize(model: Any) -> None:
    """Fold constants, apply rules and join equal nodes of an ``onnx_ir.Model``, in place."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common

    rules = [getattr(common, name) for name in _RULES if hasattr(common, name)]
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


def sample_apart(graph: Any) -> None:
    """Give each grid of positions of a convolution's output a convolution that computes no more than the grid.

    A grid is a pooling of single positions; the ``onnx.GraphProto`` is changed in place.
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
