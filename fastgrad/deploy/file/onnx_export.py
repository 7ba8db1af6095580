"""The exported graph as an ONNX file. `fastgrad.deploy.file.onnx_file` says what is in it.

Backward passes are part of the graph like any other operation; what has no ONNX form is refused by name. Two rewrites
give the same computation in less time:

`optimize` is what onnxscript's own does, without one pattern, two slices that are a split. That is looked for by going
through all nodes for each node: of the ten thousand nodes that a large network's backward pass has, that takes most of
an hour.

`sample_apart` lets ONNX Runtime stay in the layout its convolutions work in. On a CPU it keeps images in blocks of
channels as long as every operator between convolutions has a form for blocks. Clip has none; it is free as the
activation of the convolution before it, but not where something else wants that convolution's own output. What wants no
more of it than a grid of positions gets a convolution of its own.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrad.checks import extra
from fastgrad.deploy.file.description import Description, description_text, outputs_of
from fastgrad.deploy.file.graph import trace
from fastgrad.deploy.file.onnx_file import INPUT, KEY, sum_entry
from fastgrad.deploy.file.onnx_operators import PASSED_OVER, decompositions

#: The oldest version of the operators that PyTorch translates to; every runtime since 2022 reads it.
OPSET = 18
#: Whether this PyTorch writes ONNX: the passes of 2.8 refuse what its own translation makes.
TRANSLATES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
#: Protocol buffers hold no more.
_LARGEST = 2**31
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
#: A constant found by one turn lets a rule apply in the next.
_TURNS = 2
#: Products for each number of a map, up to which it costs less to compute a grid of its positions twice than to write
#: the map for two readers: an activation or a sum then joins the convolution that makes it.
_TWICE = 32


def convert(
    function: Callable[[Tensor], Any], example_input: Tensor, *, outputs: Iterable[str], max_batch: int = 1024
) -> Any:
    """Translate ``function`` as `trace` takes it to an ``onnx.ModelProto``, checked by ``onnx.checker``.

    RuntimeError where the graph depends on the batch size, is larger than 2 GB, or an operation has no ONNX form; or
    PyTorch is older than 2.9.
    """
    if not TRANSLATES:
        raise RuntimeError(f"ONNX files need PyTorch 2.9 or newer; it was {torch.__version__}; export to .pt2")
    with extra("onnx"):
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx writes with it

    known = ("aten.", "prims.", "<built-in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A fused attention's backward pass is one operation, which nothing translates, and so is oneDNN's LSTM.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            program = trace(function, example_input, max_batch=max_batch, one_by_one=False)
        table = decompositions()
        for node in program.graph.nodes:
            if node.target in PASSED_OVER:
                node.target = table[node.target]
        try:
            program = program.run_decompositions(table)
            operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            _refuse(name for name in operators if "backward" in name or not name.startswith(known))
            result: Any = torch.onnx.export(
                program, (), input_names=[INPUT], output_names=list(outputs), opset_version=OPSET,
                dynamo=True, verbose=False, optimize=False,
            )  # fmt: skip
        except RuntimeError as error:
            # Of PyTorch's own translation, or of a form of other operations that it has for an operation.
            _refuse(re.findall(r"\btarget=torch\.ops\.([\w.]+)", str(error)))
            raise
        optimize(result.model)
        sample_apart(result.model)
    model = result.model_proto
    if model.ByteSize() >= _LARGEST:
        raise RuntimeError("the model is larger than the 2 GB that one ONNX file can hold; export to .pt2")
    _tidy(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise RuntimeError(f"onnx.checker refuses the translated graph: {error}; export to .pt2") from error
    return model


def _refuse(names: Iterable[str]) -> None:
    if found := sorted(set(names)):
        otherwise = ", or fit with blocks=[...] that need no gradients" * any("backward" in name for name in found)
        raise RuntimeError(f"no ONNX form exists of {', '.join(found)}; export to .pt2{otherwise}")


def _tidy(model: Any) -> None:
    """Name the batch, and leave out where in whose files each operation came from."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"
    for part in (model, graph, *graph.node, *values, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def write(
    answers: Callable[[Tensor], tuple[Tensor, ...]], example_input: Tensor, path: Path, description: Description
) -> None:
    """Write a file that gives what ``answers`` gives, with ``description`` inside."""
    with extra("onnx"):
        import onnxruntime  # noqa: F401 - the file is run before it appears
    model = convert(answers, example_input, outputs=outputs_of(description), max_batch=description.max_batch)
    model.metadata_props.add(key=KEY, value=description_text(description))
    content = model.SerializeToString()
    path.write_bytes(content + sum_entry(hashlib.sha256(content).hexdigest()))


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
    """Give each grid of positions of a convolution's output a convolution that computes no more than the grid.

    A grid is a pooling of single positions; the ``onnx_ir.Model`` is changed in place.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    for node in model.graph:
        conv = node.inputs[0].producer() if node.op_type == "MaxPool" else None
        if conv is None or conv.op_type != "Conv" or (weight := conv.inputs[1].const_value) is None:
            continue
        steps = node.attributes["strides"].as_ints()
        # With the places beside the values, as for a gradient, it stays.
        single = set(node.attributes["kernel_shape"].as_ints()) == {1} and len(node.outputs) == 1
        rounded = "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int()
        if not single or rounded or math.prod(weight.shape[1:]) > _TWICE * math.prod(steps):
            continue
        strides = [one * other for one, other in zip(conv.attributes["strides"].as_ints(), steps, strict=True)]
        attributes = {**conv.attributes, "strides": ir.AttrInt64s("strides", strides)}
        apart = ir.Node("", "Conv", conv.inputs, attributes.values(), name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [apart], node.outputs, apart.outputs)
    passes.RemoveUnusedNodesPass()(model)
