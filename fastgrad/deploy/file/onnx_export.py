"""The exported graph as an ONNX file, as `fastgrad.deploy.file.onnx_file` describes it.

Operations without an ONNX form are refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrad.checks import extra, without_warnings
from fastgrad.deploy.file.description import Description, description_text, outputs_of
from fastgrad.deploy.file.graph import trace
from fastgrad.deploy.file.onnx_file import INPUT, KEY, LARGEST, runtime, sum_entry
from fastgrad.deploy.file.onnx_operators import decompositions

#: The oldest operator set to which PyTorch translates; every runtime since 2022 reads it.
OPSET = 18
#: Whether this PyTorch writes ONNX: the passes of 2.8 refuse its own translation.
TRANSLATES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
#: With at most this many products per number of a map, computing a grid of its positions twice costs less than writing
#: the map for two readers.
_MAX_PRODUCTS = 32


def require() -> None:
    """Raise what an ONNX file lacks: RuntimeError for PyTorch before 2.9, MissingExtraError for a missing package."""
    if not TRANSLATES:
        raise RuntimeError(f"ONNX files need PyTorch 2.9 or newer; it was {torch.__version__}; export to .pt2")
    with extra("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 - torch.onnx writes with it
    runtime()  # the file is run before it appears


def convert(
    function: Callable[[Tensor], Any], example_input: Tensor, *, outputs: Iterable[str], max_batch: int = 1024
) -> Any:
    """Translate ``function``, as for `trace`, to an ``onnx.ModelProto``, checked by ``onnx.checker``.

    RuntimeError if the graph depends on the batch size or is larger than 2 GB, or an operation has no ONNX form; and
    what `require` raises.
    """
    require()
    import onnx

    known = ("aten.", "prims.", "<built-in")
    with without_warnings():
        # Fused attention and oneDNN's LSTM are single operations without a translation.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            program = trace(function, example_input, max_batch=max_batch)
        try:
            program = program.run_decompositions(decompositions())
            operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            _refuse(name for name in operators if not name.startswith(known))
            result: Any = torch.onnx.export(
                program, (), input_names=[INPUT], output_names=list(outputs), opset_version=OPSET,
                dynamo=True, verbose=False, optimize=True,
            )  # fmt: skip
        except RuntimeError as error:
            # Raised by PyTorch's own translation, or by one of its decompositions.
            _refuse(re.findall(r"\btarget=torch\.ops\.([\w.]+)", str(error)))
            raise
        subsample_convs(result.model)
    model = result.model_proto
    if model.ByteSize() >= LARGEST:
        raise RuntimeError("the model is larger than the 2 GB that one ONNX file can hold; export to .pt2")
    _tidy(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise RuntimeError(f"onnx.checker refuses the translated graph: {error}; export to .pt2") from error
    return model


def _refuse(names: Iterable[str]) -> None:
    if found := sorted(set(names)):
        raise RuntimeError(f"no ONNX form exists of {', '.join(found)}; export to .pt2")


def _tidy(model: Any) -> None:
    """Name the batch, and remove the source file and line of each operation."""
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


def subsample_convs(model: Any) -> None:
    """Give each grid of positions of a convolution's output, in an ``onnx_ir.Model``, a convolution of that grid alone.

    A grid is a pooling with windows of one position. Without it as a second reader, the activation after the
    convolution fuses with it. ONNX Runtime then keeps images in blocks of channels, which an activation that stands
    alone, such as Clip, does not support.
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


def write(
    answers: Callable[[Tensor], tuple[Tensor, ...]], example_input: Tensor, path: Path, description: Description
) -> None:
    """Write an ONNX file that computes ``answers``, with ``description`` inside."""
    model = convert(answers, example_input, outputs=outputs_of(description), max_batch=description.max_batch)
    model.metadata_props.add(key=KEY, value=description_text(description))
    content = model.SerializeToString()
    path.write_bytes(content + sum_entry(hashlib.sha256(content).hexdigest()))
