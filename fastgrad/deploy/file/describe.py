"""Check a model before it is exported, and say what its file holds beside the graph."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad.deploy.drift import ScoreReference
from fastgrad.deploy.file.description import Description
from fastgrad.evaluation import RandomState
from fastgrad.version import __version__

#: False-alarm rates for which a file holds thresholds.
RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def describe(
    two_stage: nn.Module, example_input: Tensor, suffix: str, *,
    labels: Sequence[str] | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    false_alarm_rate: float | None = None, threshold: float | None = None, risk_threshold: float | None = None,
    scores: Tensor | np.ndarray[Any, Any] | None = None, max_batch: int = 1024, evidence: bool = False,
) -> Description:  # fmt: skip
    """Return the description of a file with this suffix; arguments and errors are those of `fastgrad.export`."""
    if false_alarm_rate is None:
        own = getattr(getattr(two_stage, "detector_", None), "options", {})
        false_alarm_rate = own.get("false_alarm_rate", 0.05)
    checks.lies_in("(0, 1)", false_alarm_rate=false_alarm_rate)
    checks.at_least(1, max_batch=max_batch)
    normalisation = getattr(getattr(two_stage, "report_", None), "normalisation", None)
    if mean is std is None and normalisation is not None:
        mean, std = normalisation
    _check_example(example_input, suffix)
    outputs = _check_model(two_stage, example_input, evidence)
    return Description(
        input_shape=tuple(example_input.shape[1:]),
        input_dtype=str(example_input.dtype).removeprefix("torch."),
        classes=outputs[0].shape[1],
        max_batch=int(max_batch),
        # ONNX is not compiled for a device: the runtime chooses one.
        device="cpu" if suffix == ".onnx" else example_input.device.type,
        # `Description` refuses text, mappings, sets and what is not iterable, which are not made a list here.
        labels=list(map(str, labels))  # type: ignore[arg-type]
        if isinstance(labels, Iterable) and not isinstance(labels, str | bytes | Mapping | set | frozenset)
        else labels,
        mean=None if mean is None else checks.to_array("mean", mean, finite=False).tolist(),
        std=None if std is None else checks.to_array("std", std, finite=False).tolist(),
        risk=len(outputs) == 4,
        risk_threshold=risk_threshold,
        wrong_above=getattr(two_stage, "wrong_above", None),
        evidence=dict(two_stage.alarms) if evidence else None,  # type: ignore[arg-type]
        versions={
            "fastgrad": __version__,
            "torch": str(torch.__version__),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "system": sys.platform,
        },
        **_calibration(two_stage, scores, float(false_alarm_rate), threshold),
    )


def _check_example(example_input: Tensor, suffix: str) -> None:
    """Refuse an example that is not a batch or does not fit this kind of file."""
    if not isinstance(example_input, Tensor) or example_input.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(
            "example_input must be one torch.Tensor of a floating dtype; it was "
            f"{getattr(example_input, 'dtype', type(example_input).__name__)}. Before fit, wrap a network with other "
            "inputs in a module that makes them of one such tensor, integers as x.long()"
        )
    if example_input.ndim < 2 or example_input.numel() == 0:
        shape = tuple(example_input.shape)
        raise ValueError(f"example_input must be a batch (B, ...) of at least one input; its shape was {shape}")
    if suffix == ".pt2" and example_input.device.type not in ("cpu", "cuda"):
        raise ValueError(f"example_input must be on the CPU or a GPU for a .pt2; it was on {example_input.device}")
    if suffix == ".onnx" and example_input.dtype == torch.bfloat16:
        raise ValueError("example_input must have another dtype for an .onnx: ONNX Runtime computes none in bfloat16")


def _check_model(two_stage: nn.Module, example_input: Tensor, evidence: bool) -> list[Tensor]:
    """Refuse a model that cannot be exported; return its outputs for the first input."""
    checks.is_bool(evidence=evidence)
    if not isinstance(two_stage, nn.Module):
        raise TypeError(f"two_stage must be a torch.nn.Module; it was {type(two_stage).__name__}")
    evaluates = getattr(two_stage, "evaluates", False)
    if not evaluates and any(module.training for module in two_stage.modules()):
        raise ValueError("two_stage must be in evaluation mode; call two_stage.eval() first")
    for block in getattr(getattr(two_stage, "extraction_", None), "blocks", ()):
        if block.live:
            raise ValueError(
                "two_stage must read no block that needs gradients; it reads "
                f"{block.name!r}, which a live model serves and a file does not. Fit with other blocks to export it"
            )
    outputs = two_stage(example_input[:1])
    given = [value for value in outputs[:4] if value is not None] if isinstance(outputs, tuple) else []
    if [getattr(value, "ndim", 0) for value in given] not in ([2, 2, 1], [2, 2, 1, 1]):
        raise ValueError(
            "two_stage must return (logits (B, N), probabilities (B, N), uncertainty (B,)), and risk (B,) if it has one"
        )
    if evidence and not hasattr(two_stage, "explain"):
        raise ValueError(
            "evidence must be False for a module that cannot explain its answers as a TwoStageModel does; "
            f"two_stage was a {type(two_stage).__name__}"
        )
    _check_steady(two_stage, example_input, outputs[0])
    return given


def _check_steady(two_stage: nn.Module, example_input: Tensor, alone: Tensor) -> None:
    """Refuse a module whose answer to the first input, with logits ``alone``, changes in another call or batch."""
    if alone.isnan().any():
        raise ValueError("example_input must be real inputs; the logits of the first were NaN, which checks nothing")
    first, last = example_input[:1], example_input[-1:]
    random, buffers = RandomState(two_stage.modules()), list(two_stage.buffers())
    versions = [buffer._version for buffer in buffers if not buffer.is_inference()]
    # Flipping gives another input even if the example holds only one.
    together = two_stage(torch.cat([first, last.flatten(1).flip(1).view(last.shape)]))[0][:1]
    drew, later = not random.same(), list(two_stage.buffers())
    written = versions != [buffer._version for buffer in later if not buffer.is_inference()]
    if drew or written or list(map(id, later)) != list(map(id, buffers)):
        differs = "draw other random numbers" if drew else "find its buffers changed"
        raise ValueError(f"two_stage must give the same answers at every call; after one, the next would {differs}")
    worst = float((together - alone).detach().abs().max() / alone.detach().abs().max())
    # Far above the rounding of any batch size, TF32 included.
    if worst > max(0.01, torch.finfo(alone.dtype).eps ** 0.5):
        raise ValueError(
            "two_stage must give an input the same answer whatever other inputs are in its batch; with another one its "
            f"logits differed by {worst:.2g} of the largest"
        )


def _calibration(
    two_stage: nn.Module, scores: Tensor | np.ndarray[Any, Any] | None, false_alarm_rate: float, chosen: float | None
) -> dict[str, Any]:
    """Return a description's fields about in-distribution scores; none without scores or any threshold."""
    if scores is None:
        scores = getattr(two_stage, "calibration_scores", None)
        scores = None if scores is None or len(scores) < 20 else scores
    fields: dict[str, Any] = {}
    rates, threshold = {*RATES, false_alarm_rate}, getattr(two_stage, "threshold", None)
    if scores is not None:
        calibration = checks.to_array("scores", scores)
        bins = ScoreReference.from_scores(calibration)
        fields["reference"] = {"edges": bins.edges.tolist(), "counts": bins.counts.tolist()}
        # The most extreme scores join the outermost bins; otherwise one of them could put all others into one bin.
        low, high = np.quantile(calibration, (0.002, 0.998))
        # Scores that differ only by rounding leave no room for bins.
        bulk = np.clip(calibration, low, high if high - low > 1e-12 * abs(low) else low)
        counts, edges = np.histogram(bulk, bins=40)
        fields["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        n, ordered = len(calibration), np.sort(calibration)
        # Rates that the calibration cannot promise are left out, except the requested one, of which a detector warns.
        rates = {rate for rate in rates if rate >= 1 / (n + 1) or rate == false_alarm_rate}

        def conformal(rate: float) -> float:
            """Return the smallest score with at most rate * (n + 1) - 1 scores above it."""
            return float(ordered[min(n, int(np.ceil((1 - rate) * (n + 1)))) - 1])

        threshold = threshold if callable(threshold) else conformal
    thresholds = {rate: float(threshold(rate)) for rate in sorted(rates)} if callable(threshold) else {}
    if chosen is not None:
        thresholds[false_alarm_rate] = chosen
    if thresholds:
        fields["thresholds"] = sorted(thresholds.items())
        fields |= {"false_alarm_rate": false_alarm_rate, "threshold": thresholds[false_alarm_rate]}
    return fields
