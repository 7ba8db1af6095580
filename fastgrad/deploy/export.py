"""One file for deployment: network, backward pass, squared norms and detector as one compiled graph.

The extraction calls ``torch.autograd.grad`` inside ``forward``, which no exporter follows. So it is
unrolled first (`fastgrad.deploy.graph`): run once on fake tensors, it leaves a flat graph of every operation, those
of the backward pass among them, without autograd. `torch.export` then checks that graph for every batch size,
and AOTInductor compiles it to native code in a ``.pt2``. `fastgrad.deploy.package` says how to read the file.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import _torch, checks
from fastgrad.deploy.drift import ScoreReference
from fastgrad.deploy.graph import trace
from fastgrad.deploy.package import Description, replace_atomically, write_description

#: What compiled code would round in another way. With PyTorch's own kernels the features of a convolutional network
#: or vision transformer are those of the live one, bit for bit or nearly: the detector has no difference to magnify.
OWN_KERNELS = (
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.gelu.default,
)
RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


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
) -> Path:
    """Write ``two_stage`` as one ``.pt2`` file that runs without fastgrad and without autograd.

    The file's graph takes a batch of any size from 1 to ``max_batch`` and returns logits, probabilities and
    uncertainty, equal to those of the live module for contiguous inputs up to float32 rounding: measured on
    trained networks, 4e-6 for logits and 2e-5 for the uncertainty, which is -log p. To an untrained network all
    images are nearly the same, and the detector magnifies rounding with what little they differ in.
    The file runs on the kind of device that holds ``example_input``, and on processors with at least this one's
    vector instructions.

    Args:
        two_stage: a fitted `TwoStageModel` (whole network or last layer only), or any module in evaluation
            mode that returns ``(logits (B, N), probabilities (B, N), uncertainty (B,))``.
        example_input: ``(B, ...)``, at least one input; only its shape, dtype and device matter.
        path: where to write, ending in ``.pt2``. The file appears whole or not at all.
        labels: N class names.
        mean: per-channel mean of the normalization that turned pixels (0 to 1) into inputs.
        std: per-channel standard deviation of the same.
        false_alarm_rate: the share of in-distribution inputs that the file's threshold flags.
        scores: uncertainties of held-out in-distribution inputs, ``(n,)``; by default those that the module
            was calibrated on (its ``calibration_scores``, if there are at least 20). They give the
            histogram and the drift monitor's reference, and the thresholds of a module without
            ``threshold``.
        max_batch: largest batch size.
        one_by_one: whether the file works through a batch one input after another, which on a CPU is faster
            for whole-network gradients of large inputs; None chooses.

    Returns:
        The path.

    Raises:
        TypeError: ``two_stage`` is no module or ``example_input`` no floating tensor.
        ValueError: an argument does not fit the model; the module is in training mode.
        RuntimeError: no C++ compiler is installed, or the module's graph depends on the batch size.
    """
    target = Path(path)
    description = _describe(
        two_stage, example_input, target, labels, mean, std, false_alarm_rate, scores, max_batch
    )
    compile_function(
        lambda x: tuple(two_stage(x)),
        example_input,
        target,
        max_batch=max_batch,
        one_by_one=one_by_one,
        finish=lambda file: write_description(file, description),
    )
    return target


def compile_function(
    function: Callable[[Tensor], Any],
    example_input: Tensor,
    path: str | os.PathLike[str],
    *,
    max_batch: int = 1024,
    one_by_one: bool | None = None,
    finish: Callable[[Path], None] = lambda file: None,
) -> None:
    """Trace ``function`` of one batch of any size, compile it, write it to ``path``.

    Args:
        function: from a tensor ``(B, ...)`` to a tensor or tuple of tensors; may call `torch.autograd.grad`.
        example_input: gives shape, dtype, device.
        path: a ``.pt2``.
        max_batch: largest batch size.
        one_by_one: as for `export`.
        finish: called with the finished file before it is moved to ``path``.

    Raises:
        RuntimeError: no C++ compiler, or the graph depends on the batch size.
    """
    require_compiler()
    program = trace(function, example_input, max_batch=max_batch, one_by_one=one_by_one)
    loop = any("while_loop" in str(node.target) for node in program.graph.nodes)

    def make(file: Path) -> None:
        own = _torch.keeping(*OWN_KERNELS) if example_input.device.type == "cpu" else contextlib.nullcontext()
        with warnings.catch_warnings(), own:
            warnings.simplefilter("ignore")
            # Channels-last convolutions suit a forward pass. The products of a gradient's norms read channels one
            # by one: each would begin with a copy.
            _torch.compile_package(program, file, keep_layout=loop)
        finish(file)

    replace_atomically(make, path)


def require_compiler() -> None:
    """Raise RuntimeError with a plain message unless a C++ compiler is installed."""
    try:
        _torch.find_cpp_compiler()
    except Exception as error:
        raise RuntimeError(
            "export compiles native code and found no C++ compiler; install one (Debian and Ubuntu: "
            "apt-get install g++) or name it in the environment variable CXX"
        ) from error


def _describe(
    two_stage: nn.Module,
    example_input: Tensor,
    path: Path,
    labels: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    false_alarm_rate: float,
    scores: Tensor | np.ndarray[Any, Any] | None,
    max_batch: int,
) -> Description:
    """Check every argument, run the model once, and collect what travels in the file."""
    if not isinstance(two_stage, nn.Module):
        raise TypeError(f"two_stage must be a torch.nn.Module; it was {type(two_stage).__name__}")
    checks.is_float("example_input", example_input)
    if example_input.ndim < 2 or example_input.numel() == 0:
        raise ValueError(
            f"example_input must be a batch (B, ...) of at least one input; "
            f"its shape was {tuple(example_input.shape)}"
        )
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2; it was {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder; there is no {str(path.parent)!r}")
    if not isinstance(max_batch, int) or max_batch < 1:
        raise ValueError(f"max_batch must be a positive int; it was {max_batch!r}")
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie between 0 and 1; it was {false_alarm_rate!r}")
    evaluates = getattr(two_stage, "evaluates", False)
    if not evaluates and any(module.training for module in two_stage.modules()):
        raise ValueError("two_stage must be in evaluation mode; call two_stage.eval() first")
    channels = example_input.shape[1] if example_input.ndim == 4 else None
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if channels is None:
            raise ValueError(f"{name} needs an example_input of images (B, C, H, W)")
        if len(values) != channels or not all(np.isfinite(float(value)) for value in values):
            raise ValueError(
                f"{name} must be {channels} finite numbers, one a channel; it was {list(values)!r}"
            )
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"std must be positive; it was {list(std)!r}")

    outputs = two_stage(example_input[:1])
    if not isinstance(outputs, tuple) or len(outputs) != 3 or outputs[0].ndim != 2 or outputs[2].ndim != 1:
        raise ValueError("two_stage must return (logits (B, N), probabilities (B, N), uncertainty (B,))")
    classes = outputs[0].shape[1]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"labels must be {classes} names, one a class; there were {len(labels)}")

    calibration = _scores(two_stage, scores)
    threshold, thresholds = _thresholds(two_stage, calibration, false_alarm_rate)
    histogram = reference = None
    if calibration is not None:
        # The few most extreme scores join the outermost bins, or one of them could leave all others in one
        # bin.
        bulk = np.clip(calibration, *np.quantile(calibration, (0.002, 0.998)))
        counts, edges = np.histogram(bulk, bins=40)
        histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
        bins = ScoreReference.from_scores(calibration)
        reference = {"edges": bins.edges.tolist(), "counts": bins.counts.tolist()}
    try:
        own = version("fastgrad")
    except PackageNotFoundError:
        own = "unknown"
    return Description(
        input_shape=tuple(example_input.shape[1:]),
        input_dtype=str(example_input.dtype).removeprefix("torch."),
        classes=classes,
        max_batch=max_batch,
        device=example_input.device.type,
        labels=None if labels is None else [str(label) for label in labels],
        mean=None if mean is None else [float(value) for value in mean],
        std=None if std is None else [float(value) for value in std],
        false_alarm_rate=None if threshold is None else false_alarm_rate,
        threshold=threshold,
        thresholds=thresholds,
        histogram=histogram,
        reference=reference,
        versions={
            "fastgrad": own,
            "torch": str(torch.__version__),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    )


def _scores(two_stage: nn.Module, scores: Any) -> np.ndarray[Any, Any] | None:
    if scores is None:
        scores = getattr(two_stage, "calibration_scores", None)
        if scores is None or len(scores) < 20:
            return None
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu().numpy()
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 20 or not np.isfinite(values).all():
        raise ValueError(
            f"scores must be at least 20 finite numbers in one dimension; the shape was {values.shape}"
        )
    return values


def _thresholds(
    two_stage: nn.Module, scores: np.ndarray[Any, Any] | None, rate: float
) -> tuple[float | None, list[tuple[float, float]]]:
    rates = sorted({*RATES, rate})
    own = getattr(two_stage, "threshold", None)
    if callable(own):
        pairs = [(value, float(own(value))) for value in rates]
    elif scores is not None:
        # The conformal quantile: the smallest score with at most rate * (n + 1) - 1 scores at or above it.
        n = len(scores)
        ordered = np.sort(scores)
        pairs = [
            (value, float(ordered[min(n - 1, int(np.ceil((1 - value) * (n + 1))) - 1)])) for value in rates
        ]
    else:
        return None, []
    return dict(pairs)[rate], pairs
