"""One file for deployment: network, backward pass, squared norms and detector as one graph.

The extraction calls ``torch.autograd.grad`` inside ``forward``, which no exporter follows. `fastgrad.deploy.file.graph`
unrolls it: run once on fake tensors, it leaves a flat graph of every operation, without autograd. AOTInductor compiles
that to native code in a ``.pt2``, or it becomes an ONNX file (`fastgrad.deploy.file.onnx_export`).
`fastgrad.deploy.file.package` says how to read either.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import _torch
from fastgrad.atomic import replace_atomically
from fastgrad.deploy.file import onnx_export
from fastgrad.deploy.file.describe import describe
from fastgrad.deploy.file.graph import trace
from fastgrad.deploy.file.package import write_description

#: What compiled code would round in another way. With PyTorch's own kernels the features of a convolutional network
#: or vision transformer are those of the live one, bit for bit or nearly: the detector has no difference to magnify.
OWN_KERNELS = (
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.gelu.default,
)


def export(
    two_stage: nn.Module,
    example_input: Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    false_alarm_rate: float = 0.05,
    scores: Tensor | np.ndarray[Any, Any] | None = None,
    max_batch: int = 1024,
    one_by_one: bool | None = None,
    tolerance: float = 1e-4,
    evidence: bool = False,
) -> Path:
    """Write ``two_stage`` as one file that runs without fastgrad and without autograd.

    The path's suffix chooses the form. ``.pt2`` is native code for PyTorch. ``.onnx`` is for ONNX Runtime, NVIDIA's
    Triton Inference Server and others (`fastgrad.deploy.file.onnx_file`).

    The graph takes a batch of any size from 1 to ``max_batch``. It returns logits, probabilities, uncertainty and, if
    fitted with labels, risk. For contiguous inputs they equal those of the live module up to float32 rounding. On an
    untrained network all images are nearly the same, and the detector magnifies the rounding.

    A ``.pt2`` runs on the kind of device that holds ``example_input``, and on processors with at least this one's
    vector instructions. An ``.onnx`` runs wherever ONNX Runtime does. It is checked by ``onnx.checker``, and its
    answers on ``example_input`` are compared with the live module's before it appears. With gradients, rounding that
    moves an activation across the kink of a ReLU changes the backward pass, and the answer with it.

    Args:
        two_stage: a fitted `TwoStageModel` (whole network or last layer only), or any module in evaluation
            mode that returns ``(logits (B, N), probabilities (B, N), uncertainty (B,))`` and, if it has one, ``risk
            (B,)``.
        example_input: ``(B, ...)``, at least one input. To a ``.pt2`` only its shape, dtype and device matter; an
            ``.onnx`` is checked on it, so real inputs serve best.
        path: where to write, ending in ``.pt2`` or ``.onnx``. The file appears whole or not at all.
        labels: N class names.
        mean: per-channel mean of the normalization that turned pixels (0 to 1) into inputs.
        std: per-channel standard deviation of the same.
        false_alarm_rate: the share of in-distribution inputs that the file's threshold flags.
        scores: uncertainties of held-out in-distribution inputs, ``(n,)``; by default the module's
            ``calibration_scores``, if there are at least 20. They give the histogram, the drift monitor's reference,
            and the thresholds of a module without ``threshold``.
        max_batch: largest batch size.
        one_by_one: whether the file works through a batch one input after another, which on a CPU is faster
            for whole-network gradients of large inputs; None chooses. ONNX files never do.
        tolerance: largest difference of an ONNX file's outputs from the live module's, relative to their size or 1.
            The detector may turn 4e-6 of rounding into 1e-4 of evidence.
        evidence: whether the graph also returns ``evidence`` ``(B, E)``: which of the E parts of the detector raised
            an alarm (`TwoStageModel.explain`). The server then says so.

    Returns:
        The path.

    Raises:
        TypeError: ``two_stage`` is no module or ``example_input`` no floating tensor.
        ValueError: an argument does not fit the model; the module is in training mode.
        MissingExtraError: an ``.onnx`` needs ``pip install 'fastgrad[onnx]'``.
        RuntimeError: no C++ compiler is installed for a ``.pt2``, or the module's graph depends on the batch size. For
            an ``.onnx``: an operation has no ONNX form, or the answers differ by more than ``tolerance``.
    """
    target = Path(path)
    description = describe(
        two_stage, example_input, target, labels, mean, std, false_alarm_rate, scores, max_batch, evidence
    )

    def answers(x: Tensor) -> tuple[Tensor, ...]:
        prediction, parts = two_stage.explain(x)[:2] if evidence else (two_stage(x), None)  # type: ignore[operator]
        # Without labels there is no risk.
        given = tuple(value for value in prediction if value is not None)
        return given if parts is None else (*given, torch.stack(list(parts.values()), -1))

    onnx = target.suffix == ".onnx"
    if onnx and one_by_one:
        raise ValueError("one_by_one must be None or False for an .onnx, which has no loop; it was True")
    if onnx and not tolerance > 0:
        raise ValueError(f"tolerance must be positive; it was {tolerance!r}")

    def write(file: Path) -> None:
        if onnx:
            onnx_export.write(two_stage, answers, example_input, file, description, tolerance=tolerance)
        else:
            compile_function(answers, example_input, file, max_batch=max_batch, one_by_one=one_by_one)
            write_description(file, description)

    replace_atomically(write, target)
    return target


def compile_function(
    function: Callable[[Tensor], Any],
    example_input: Tensor,
    path: str | os.PathLike[str],
    *,
    max_batch: int = 1024,
    one_by_one: bool | None = None,
) -> None:
    """Trace ``function`` of one batch of any size, compile it, write it to ``path``.

    Args:
        function: from a tensor ``(B, ...)`` to a tensor or tuple of tensors; may call `torch.autograd.grad`.
        example_input: gives shape, dtype, device.
        path: a ``.pt2``.
        max_batch: largest batch size.
        one_by_one: as for `export`.

    Raises:
        RuntimeError: no C++ compiler, or the graph depends on the batch size.
    """
    _torch.require_cpp_compiler("export")
    program = trace(function, example_input, max_batch=max_batch, one_by_one=one_by_one)
    loop = any("while_loop" in str(node.target) for node in program.graph.nodes)
    on_cpu = example_input.device.type == "cpu"

    own = _torch.keeping(*OWN_KERNELS) if on_cpu else contextlib.nullcontext()
    with warnings.catch_warnings(), own:
        warnings.simplefilter("ignore")
        # Channels-last convolutions suit a forward pass. The products of a gradient's norms read channels one
        # by one: each would begin with a copy.
        _torch.compile_package(program, Path(path), keep_layout=loop)
