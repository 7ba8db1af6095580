"""`TwoStageModel.fit` from top to bottom: data, features, calibration, correction, risk, report."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor, nn

from fastgrad import checks
from fastgrad.batches import batch_size, pieces, take, to_device
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS, Block, Penultimate
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.features import Features
from fastgrad.blocks.subject import Subject, unlike_inputs, watch
from fastgrad.challenges import CHALLENGES, challenge_cost
from fastgrad.detector import collect, constants, data
from fastgrad.detector.calibrate import Calibrated, DetectorModule
from fastgrad.detector.data import Data
from fastgrad.detector.estimator import UncertaintyDetector, fit_detector
from fastgrad.detector.grey_levels import sensitivity
from fastgrad.detector.inputs import BlocksByName, check_blocks
from fastgrad.detector.loaders import Given
from fastgrad.detector.report import Report, probability_suffices
from fastgrad.detector.risk import NoisyOr, Risk, doubt, tempered
from fastgrad.evaluation import RandomState, agree, device_of, refuse_devices
from fastgrad.introspection.correction import Correction, choose
from fastgrad.scores.temperature import Temperature

#: Two computations of a block agree up to its square root: networks in half precision round to some hundredths.
_ROUNDING = 2.5e-3


class Parts(NamedTuple):
    """What a fit gives a two-stage model; modules that it does not need are None."""

    detector: DetectorModule
    correction: Correction | None
    gate: NoisyOr | None
    temperature: Temperature | None
    risk: Risk | None
    extraction: Extraction
    report: Report


def fit(
    model: nn.Module, detector: UncertaintyDetector | None, asked: Sequence[Block] | None, seed: int, *,
    risk: bool | None, correct: bool | str, verbose: bool | None, **given: Any,
) -> Parts:  # fmt: skip
    """Fit on what was ``given``, arguments of `prepare`, with blocks that were ``asked`` for or the default ones."""
    sample, extraction, blocks, left_out = prepare(
        model, detector, asked, seed, correct=bool(correct), verbose=verbose, **given
    )
    data.require_labels(sample.labels, risk=risk, correct=correct, generate=sample.each > 0)
    features = collect.read(extraction, sample, seed, verbose)
    parts = fit_features(model, detector, blocks, features, seed, risk=risk, correct=correct, extraction=extraction)
    report = replace(
        parts.report, left_out=left_out, seen=sample.seen, passes=_passes(sample, parts.report),
        normalisation=sample.normalisation, levels=_levels(sample, parts, seed),
    )  # fmt: skip
    return parts._replace(report=report)


def read(
    model: nn.Module, detector: UncertaintyDetector | None, asked: Sequence[Block] | None, seed: int, *,
    verbose: bool | None = None, **given: Any,
) -> Features:  # fmt: skip
    """Return the features that `fit` would be fitted on."""
    sample, extraction, _, _ = prepare(model, detector, asked, seed, correct=False, verbose=verbose, **given)
    return collect.read(extraction, sample, seed, verbose)


def prepare(
    model: nn.Module, detector: UncertaintyDetector | None, asked: Sequence[Block] | None, seed: int, *,
    correct: bool, clean: Given, y: Any = None, challenges: str | Given | None = "generate",
    calibration: Given | None = None, max_samples: int = constants.MOST_CLEAN, challenges_per_input: int | None = None,
    clip: tuple[float, float] | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    verbose: bool | None = None,
) -> tuple[Data, Extraction, list[Block], dict[str, str]]:  # fmt: skip
    """Draw and check all inputs; return them, what reads them, the detector's blocks, and why others are left out."""
    if verbose is not None:
        checks.is_bool(verbose=verbose)
    refuse_devices(model)
    base = _base(detector, seed)
    if calibration is not None and base.calibration_fraction is not None:
        raise ValueError(
            f"calibration must be None where the detector's calibration_fraction is given, {base.calibration_fraction}"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    drawn, others = data.draw(
        clean, y, challenges, calibration, max_samples=max_samples, challenges_per_input=challenges_per_input,
        dtype=dtype, seed=seed, verbose=verbose,
    )  # fmt: skip
    x = to_device(drawn[0].batches[0], device_of(model))
    try:
        subject = watch(model, *arguments(x))
    except Exception as error:
        if (wanted := unlike_inputs(x)) is None:
            raise
        raise ValueError(f"clean must give {wanted}. The network raised {type(error).__name__}: {error}") from error
    blocks, left_out = _blocks(asked, subject)
    if correct and subject.head is None:
        raise ValueError("correct=True needs a model that ends in a linear layer")
    sample = data.check(
        drawn, others, subject.classes, generate=isinstance(challenges, str), each=challenges_per_input,
        fraction=base.calibration_fraction, random_state=clone(base).random_state, seed=seed, clip=clip,
        mean=mean, std=std,
    )  # fmt: skip
    # The correction reads h, also where the detector does not.
    added = [Penultimate()] if correct and all(block.name != Penultimate.name for block in blocks) else []
    # Logarithms of norms cannot underflow, but the user's detector may expect the norms themselves.
    extraction = Extraction(model, [*blocks, *added], log=not base.log, subject=subject)
    _require_own(extraction, x)
    return sample, extraction, blocks, left_out


def fit_features(
    model: nn.Module, detector: UncertaintyDetector | None, blocks: Sequence[Block], features: Features, seed: int, *,
    risk: bool | None, correct: bool | str, extraction: Extraction | None = None,
) -> Parts:  # fmt: skip
    """Fit a detector that reads ``blocks``, and what follows from labels, on features of inputs and challenges."""
    base, device = _base(detector, seed), device_of(model)
    by_name: BlocksByName = {**BLOCKS, **{block.name: block for block in blocks}}
    checked = check_blocks(features.only(block.name for block in blocks).blocks, by_name, log=base.log)
    random = check_random_state(clone(base).random_state)
    fitted = fit_detector(base, replace(features, blocks=checked), by_name, random)
    labels, challenging = features.labels, features.challenging
    temperature, usual = None, (labels >= 0) & ~challenging
    if usual.sum() >= constants.FEWEST_LABELLED:
        temperature = Temperature.fit(features.logits[usual], labels[usual])
    logits = tempered(features.logits, temperature)
    log_p, correction, gate, corrected = logits.double().log_softmax(-1), None, None, None
    if correct:
        gate, labelled = NoisyOr.fit(None, fitted.evidence, challenging, challenging), labels >= 0
        correction, log_p[labelled], corrected = choose(
            features.at(labelled), logits[labelled], gate.log_odds(fitted.evidence)[labelled], seed,
            always=correct == "always",
        )  # fmt: skip
    estimate, why = _risk(log_p, features, fitted, risk)
    kept = list(blocks)
    if correction is None:
        gate = None
    elif all(block.name != Penultimate.name for block in kept):
        kept.append(Penultimate())
    for part in (fitted.module, correction, gate, temperature, estimate):
        if part is not None:
            part.to(device)
    extraction = Extraction(model, kept, log=not base.log) if extraction is None else extraction.of(kept)
    report = _report(features, blocks, fitted.module, why, corrected)
    return Parts(fitted.module, correction, gate, temperature, estimate, extraction, report)


def _base(detector: UncertaintyDetector | None, seed: int) -> UncertaintyDetector:
    return detector or UncertaintyDetector(log=False, random_state=seed)


def _blocks(asked: Sequence[Block] | None, subject: Subject) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks that were asked for, or the default ones that can be served, and why others cannot."""
    blocks = [BLOCKS[name]() for name in DEFAULT_BLOCKS] if asked is None else list(asked)
    refused = {block.name: why for block in blocks if (why := block.refusal(subject)) is not None}
    if asked is None:
        return [block for block in blocks if block.name not in refused], refused
    for name, why in refused.items():
        possible = ", ".join(repr(name) for name, kind in BLOCKS.items() if kind().refusal(subject) is None)
        raise ValueError(f"blocks must be ones that the network can serve, {possible}; {name!r}: {why}")
    return blocks, {}


def _require_own(extraction: Extraction, x: Inputs) -> None:
    """Raise ValueError if a block of an input changes with other inputs in the batch; warn of random numbers."""
    samples, before = batch_size(x), RandomState(extraction.model.modules())
    whole, *parts = (extraction(take(x, slice(*ends), samples))[1] for ends in ((0, 8), (0, 2), (2, 8)))
    if not before.same():
        # The comparison below would fail: parts of a batch get other random numbers.
        warnings.warn(
            "model draws random numbers in evaluation mode: an input that is given again gets another answer, "
            "uncertainty and risk",
            stacklevel=6,  # whoever calls `TwoStageModel.fit`
        )
        return
    for block in extraction.blocks:
        alone, together = torch.cat([part[block.name] for part in parts]).double(), whole[block.name].double()
        if block.squared_norms and extraction.log:
            # Norms that are 0 up to rounding have logarithms that differ.
            alone, together = alone.exp(), together.exp()
        if len(together) != min(8, samples) or not agree(alone, together, _ROUNDING):
            raise ValueError(
                f"blocks must hold a row for each sample that is its own; {block.name!r} has other rows, or other "
                "values with other samples in the batch"
            )


def _risk(log_p: Tensor, features: Features, fitted: Calibrated, asked: bool | None) -> tuple[Risk | None, str]:
    """Return the risk of answers ``log_p`` ``(n, N)``, from the features' labels, and what it was learned from."""
    if asked is False:
        return None, "none: not asked for"
    chosen, codes = features.labels >= 0, features.codes
    if not chosen.any():
        return None, "none: no labels" if log_p.shape[1] > 1 else "none: the network has one logit"
    if (usual := int((chosen & (codes == 0)).sum())) < constants.FEWEST_LABELLED:
        return None, f"none: {usual} labelled clean inputs are too few; it needs {constants.FEWEST_LABELLED}"
    log_p, codes = log_p[chosen], codes[chosen]
    wrong = log_p.argmax(-1) != features.labels[chosen]
    signs = doubt(log_p), fitted.evidence[chosen], fitted.log_p[chosen]
    risk, clean = Risk.fit(*signs, wrong, codes), codes == 0
    # The risk was fitted on these answers: if even so it ranks them no better, it does not on new ones.
    suffices = probability_suffices(*(values[clean].numpy() for values in (risk(*signs), signs[0], wrong)))
    made = int((codes > 0).sum())
    others = (
        f"and {made} of their challenges, {int(wrong[codes > 0].sum())} answered wrongly"
        if made
        else "without generated challenges that have labels: unusual inputs do not raise it"
    )
    return risk, f"from {usual} clean inputs, {int(wrong[clean].sum())} answered wrongly; {others}{suffices}"


def _report(
    features: Features, blocks: Sequence[Block], module: DetectorModule, risk: str, correction: str | None
) -> Report:
    kinds = Counter(sorted(kind for kind in features.kinds if kind))
    drawn = len(features) - kinds.total()
    return Report(
        {block.name: block.price for block in blocks}, {}, drawn, drawn, dict(kinds), None,
        int(module.options["sources"]), bool(module.options["exact"]), risk, correction,
    )  # fmt: skip


def _passes(sample: Data, report: Report) -> float:
    """Return the predicted cost of making challenges and reading everything, in forward passes over clean inputs."""
    # Challenges of token ids are made without the model.
    names = [name for name in report.challenges if name in CHALLENGES]
    making = challenge_cost(sample.each, names=names) / sample.each - 1 if sample.each else 0
    return report.predicted + (report.predicted + making) * sum(report.challenges.values()) / report.drawn


def _levels(sample: Data, parts: Parts, seed: int) -> dict[str, float] | None:
    """Return what one grey level does to clean images."""
    if sample.pixels is None:
        return None
    first, *others = sample.drawn[0].images
    alike = torch.cat([first, *(x for x in others if x.shape[1:] == first.shape[1:])])
    detector, device, limit = parts.detector, device_of(parts.extraction.model), parts.detector.threshold()

    def flagged(images: Tensor) -> Tensor:
        read = (parts.extraction(to_device(part, device))[1] for part in pieces(images, device))
        return torch.cat([detector(blocks).cpu() for blocks in read]) > limit

    return sensitivity(alike, sample.pixels, flagged, seed)
