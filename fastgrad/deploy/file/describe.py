"""What travels in an exported file, collected from a module and checked before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad.deploy.drift import ScoreReference
from fastgrad.deploy.file.package import SUFFIXES, Description

RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def describe(
    two_stage: nn.Module,
    example_input: Tensor,
    path: Path,
    labels: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    false_alarm_rate: float,
    scores: Tensor | np.ndarray[Any, Any] | None,
    max_batch: int,
    evidence: bool,
) -> Description:
    """Check the arguments, run the model once, and collect what travels in the file, which checks itself."""
    checks.is_bool("evidence", evidence)
    if not isinstance(two_stage, nn.Module):
        raise TypeError(f"two_stage must be a torch.nn.Module; it was {type(two_stage).__name__}")
    checks.is_float("example_input", example_input)
    if example_input.ndim < 2 or example_input.numel() == 0:
        shape = tuple(example_input.shape)
        raise ValueError(f"example_input must be a batch (B, ...) of at least one input; its shape was {shape}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}; it was {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder; there is no {str(path.parent)!r}")
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie between 0 and 1; it was {false_alarm_rate!r}")
    evaluates = getattr(two_stage, "evaluates", False)
    if not evaluates and any(module.training for module in two_stage.modules()):
        raise ValueError("two_stage must be in evaluation mode; call two_stage.eval() first")
    outputs = two_stage(example_input[:1])
    given = [value for value in outputs if value is not None] if isinstance(outputs, tuple) else []
    if [value.ndim for value in given] not in ([2, 2, 1], [2, 2, 1, 1]):
        raise ValueError(
            "two_stage must return (logits (B, N), probabilities (B, N), uncertainty (B,)), and risk (B,) if it has one"
        )
    if evidence and not hasattr(two_stage, "explain"):
        raise ValueError(
            "evidence must be False for a module that cannot explain its answers as a TwoStageModel does; "
            f"two_stage was a {type(two_stage).__name__}"
        )

    calibration = _scores(two_stage, scores)
    threshold, thresholds = _thresholds(two_stage, calibration, false_alarm_rate)
    histogram = reference = None
    if calibration is not None:
        # The most extreme scores join the outermost bins, or one of them could leave all others in one bin.
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
        classes=outputs[0].shape[1],
        max_batch=max_batch,
        # ONNX is no compiled code: the runtime chooses.
        device=example_input.device.type if path.suffix == ".pt2" else "cpu",
        labels=None if labels is None else [str(label) for label in labels],
        mean=None if mean is None else [float(value) for value in mean],
        std=None if std is None else [float(value) for value in std],
        false_alarm_rate=None if threshold is None else false_alarm_rate,
        threshold=threshold,
        thresholds=thresholds,
        histogram=histogram,
        reference=reference,
        risk=len(given) == 4,
        evidence=dict(two_stage.alarms) if evidence else None,  # type: ignore[arg-type]
        versions={"fastgrad": own, "torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()},
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
        raise ValueError(f"scores must be at least 20 finite numbers in one dimension; the shape was {values.shape}")
    return values


def _thresholds(
    two_stage: nn.Module, scores: np.ndarray[Any, Any] | None, rate: float
) -> tuple[float | None, list[tuple[float, float]]]:
    # Rates that the calibration cannot promise are left out; the one that was asked for warns.
    least = 0.0 if scores is None else 1 / (len(scores) + 1)
    rates = sorted({*(value for value in RATES if value >= least), rate})
    own = getattr(two_stage, "threshold", None)
    if callable(own):
        pairs = [(value, float(own(value))) for value in rates]
    elif scores is not None:
        # The conformal quantile: the smallest score with at most rate * (n + 1) - 1 scores at or above it.
        n = len(scores)
        ordered = np.sort(scores)
        pairs = [(value, float(ordered[min(n - 1, int(np.ceil((1 - value) * (n + 1))) - 1)])) for value in rates]
    else:
        return None, []
    return dict(pairs)[rate], pairs
