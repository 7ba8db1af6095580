"""One file for deployment: network and detector as one graph.

A run on fake tensors records every operation in a flat graph (`fastgrad.deploy.file.graph`). AOTInductor compiles it to
native code in a ``.pt2``, or it becomes an ONNX file (`fastgrad.deploy.file.onnx_export`).
`fastgrad.deploy.file.package` reads both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import _torch, checks
from fastgrad.atomic import replace_atomically
from fastgrad.deploy.file import onnx_export
from fastgrad.deploy.file.comparison import compare
from fastgrad.deploy.file.describe import describe
from fastgrad.deploy.file.graph import trace
from fastgrad.deploy.file.package import SUFFIXES, write_description
from fastgrad.evaluation import evaluating

#: Operations that compiled code would round differently. With PyTorch's own kernels, the features of convolutional
#: networks and vision transformers (nearly) equal the live ones bit by bit, so the detector has nothing to magnify.
OWN_KERNELS = (
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.gelu.default,
)


@_torch.private_cache()
def export(
    two_stage: nn.Module,
    example_input: Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    false_alarm_rate: float | None = None,
    threshold: float | None = None,
    risk_threshold: float | None = None,
    scores: Tensor | np.ndarray[Any, Any] | None = None,
    max_batch: int = 1024,
    tolerance: float = 1e-4,
    evidence: bool = False,
) -> Path:
    """Write ``two_stage`` as one file that runs without fastgrad and without autograd.

    The suffix of the path chooses the form: ``.pt2`` is native code for PyTorch; ``.onnx`` is for ONNX Runtime,
    NVIDIA's Triton Inference Server and others (`fastgrad.deploy.file.onnx_file`).

    The graph takes a batch of any size from 1 to ``max_batch`` and returns logits, probabilities, uncertainty and, if
    fitted with labels, risk. For contiguous inputs they equal those of the live module up to float32 rounding, which
    the detector of an untrained network magnifies. Blocks of gradient norms are refused: only the live module serves
    them.

    A ``.pt2`` runs on this operating system, on the kind of device that holds ``example_input``, on processors with at
    least the vector instructions that PyTorch uses here (``ATEN_CPU_CAPABILITY`` sets fewer), and under this PyTorch or
    a newer one. An ``.onnx`` runs wherever ONNX Runtime does, and is checked by ``onnx.checker``. Before either file
    appears, its answers to ``example_input`` are compared with those of the live module.

    Args:
        two_stage: A fitted `TwoStageModel`, or any module in evaluation mode that returns ``(logits (B, N),
            probabilities (B, N), uncertainty (B,))`` and, if it has one, ``risk (B,)``.
        example_input: ``(B, ...)``, at least one input. The file is checked on it, so real inputs serve best.
        path: Where to write, ending in ``.pt2`` or ``.onnx``. The file appears whole or not at all.
        labels: N class names.
        mean: Per-channel mean of the normalization of pixels from 0 to 1; if it and ``std`` are None, those of
            `TwoStageModel.fit`.
        std: Per-channel standard deviation.
        false_alarm_rate: Share of in-distribution inputs that the file's threshold flags; None for the detector's own,
            or 0.05.
        threshold: Uncertainty above which an input is flagged, such as that of
            `fastgrad.metrics.false_alarm_threshold`; None for the calibration's threshold at ``false_alarm_rate``.
        risk_threshold: Highest risk of an accepted answer, such as that of `certified_threshold`. Answers then say
            whether they are ``accepted``.
        scores: Uncertainties ``(n,)`` of held-out in-distribution inputs, at least 20; None for the module's
            ``calibration_scores``. They give the histogram, the reference of the drift monitor, and the thresholds of a
            module without ``threshold``.
        max_batch: Largest batch size.
        tolerance: Largest difference of the file's outputs from the live module's, relative to their size or 1. A
            larger one passes if rounding explains it: if the live module's own answer moves as far when each number of
            its input moves by 100 units of rounding.
        evidence: Whether the graph also returns ``evidence`` ``(B, E)`` of the E parts of the detector
            (`TwoStageModel.explain`). The server then says what raised an alarm.

    Returns:
        The path.

    Raises:
        TypeError: ``two_stage`` is not a module, ``example_input`` not a floating tensor, or ``path`` not a path.
        ValueError: An argument does not fit the model, a block of the module needs gradients, or the module is in
            training mode, draws random numbers, changes its buffers, or mixes the inputs of a batch.
        MissingExtraError: An ``.onnx`` needs ``pip install 'fastgrad[onnx]'``.
        RuntimeError: For a ``.pt2``, no C++ compiler is installed or PyTorch cannot compile here (Windows before 2.9);
            the module's graph depends on the batch size; the answers differ by more than ``tolerance``; or an operation
            has no ONNX form.
    """
    target = check_target(path)
    checks.lies_in("(0, inf]", tolerance=tolerance)
    description = describe(
        two_stage, example_input, target.suffix, labels=labels, mean=mean, std=std, false_alarm_rate=false_alarm_rate,
        threshold=threshold, risk_threshold=risk_threshold, scores=scores, max_batch=max_batch, evidence=evidence,
    )  # fmt: skip

    def answers(x: Tensor) -> tuple[Tensor, ...]:
        prediction, parts = two_stage.explain(x)[:2] if evidence else (two_stage(x), None)  # type: ignore[operator]
        # Without labels there is no risk; what is flagged follows from the description's threshold.
        given = tuple(value for value in prediction[:4] if value is not None)
        return given if parts is None else (*given, torch.stack(list(parts.values()), -1))

    def write(file: Path) -> None:
        if target.suffix == ".onnx":
            onnx_export.write(answers, example_input, file, description)
        else:
            compile_function(answers, example_input, file, max_batch=max_batch)
            write_description(file, description)
        dtypes = {example_input.dtype, *(value.dtype for value in two_stage.parameters() if value.is_floating_point())}
        compare(file, answers, example_input, tolerance, max(torch.finfo(dtype).eps for dtype in dtypes))

    # Otherwise, a network in training mode would be copied while it is recorded.
    with evaluating(two_stage):
        replace_atomically(write, target)
    return target


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return ``path``; raise what `export` raises of a path, and of what is not installed that its kind of file needs.

    What takes minutes before it exports, such as a fit, asks first.
    """
    checks.is_path(path=path)
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}; it was {str(target)!r}")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"path must be a file's in an existing folder, and no folder; it was {str(target)!r}")
    if target.suffix == ".onnx":
        onnx_export.require()
    else:
        _torch.require_cpp_compiler("export")
    return target


@_torch.private_cache()
def compile_function(
    function: Callable[[Tensor], Any], example_input: Tensor, path: Path, *, max_batch: int = 1024
) -> None:
    """Trace ``function``, compile it for batches of any size, write it to ``path``; the arguments are `trace`'s."""
    _torch.require_cpp_compiler("export")
    program = trace(function, example_input, max_batch=max_batch)
    kernels = _torch.keeping(*OWN_KERNELS) if example_input.device.type == "cpu" else contextlib.nullcontext()
    with checks.without_warnings(), kernels:
        _torch.compile_package(program, path)
