"""Fewer operators for the same computation, found in a time that grows with the graph.

onnxscript's `optimize` does as much, but looks for one pattern, two slices that are a split, by going through all nodes
for each node: of the ten thousand nodes that a large network's backward pass has, that takes most of an hour.
"""

from __future__ import annotations

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
