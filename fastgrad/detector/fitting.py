"""`TwoStageModel.fit`, step by step: draw, check, read, probabilities, calibrate, risk, report."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor, nn

from fastgrad.batches import batch_size, pieces, take, to_device
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS, Block, Features
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.subject import Subject, unlike_inputs, watch
from fastgrad.challenges import CHALLENGES, challenge_cost
from fastgrad.checks import groups_of
from fastgrad.detector import collect, constants, loaders
from fastgrad.detector.calibrate import Calibrated, DetectorModule, Table
from fastgrad.detector.collect import Sample
from fastgrad.detector.estimator import UncertaintyDetector, fit_table
from fastgrad.detector.grey_levels import sensitivity
from fastgrad.detector.inputs import Blocks, check_blocks, kinds_of
from fastgrad.detector.report import Report, probability_suffices
from fastgrad.detector.risk import NoisyOr, Risk, doubt, tempered
from fastgrad.evaluation import RandomState, agree, device_of, refuse_devices
from fastgrad.introspection.correction import Correction, Labelled, choose
from fastgrad.scores.rows import as_tensor
from fastgrad.scores.temperature import Temperature

#: The modules that a fit makes; those that it does not need are None.
FITTED = ("detector", "correction", "gate", "temperature", "risk")
#: Two computations of a block agree up to its square root: networks in half precision round to some hundredths.
_ROUNDING = 2.5e-3


@dataclass(frozen=True)
class Parts:
    """What a fit gives a two-stage model; parts that it does not need are None."""

    extraction: Extraction
    detector: DetectorModule
    correction: Correction | None
    gate: NoisyOr | None
    temperature: Temperature | None
    risk: Risk | None
    report: Report | None = None


def fit(
    model: nn.Module, detector: UncertaintyDetector | None, asked: Sequence[Block] | None, options: loaders.FitOptions
) -> Parts:
    """Fit with the blocks that were ``asked`` for, or with those of the default ones that the network can serve."""
    refuse_devices(model)
    base = detector or UncertaintyDetector(log=False, random_state=options.seed)
    clean, given = loaders.draw_all(options, base.calibration_fraction, network_dtype(model))
    device, verbose = device_of(model), options.verbose
    x = to_device(clean[0].batches[0], device)
    try:
        subject = watch(model, *arguments(x))
    except Exception as error:
        if (wanted := unlike_inputs(x)) is None:
            raise
        raise ValueError(f"clean must give {wanted}. The network raised {type(error).__name__}: {error}") from error
    blocks, left_out = _blocks(asked, subject)
    if options.correct and subject.head is None:
        raise ValueError("correct=True needs a model that ends in a linear layer")
    sample = loaders.build_sample(clean, given, subject.classes, clone(base), options)
    # The correction reads h, also where the detector does not.
    added = [Features()] if options.correct and all(block.name != Features.name for block in blocks) else []
    # Logarithms of norms cannot underflow, but the user's detector may expect the norms themselves.
    extraction = Extraction(model, [*blocks, *added], log=not base.log, known=subject)
    generated = collect.generated_batches(sample, model, device, options.seed, verbose)
    _require_own(extraction, x)
    features = collect.read(extraction, device, itertools.chain(collect.drawn_batches(sample, verbose), generated))
    # A challenge has the label of the clean input it was made from; inputs held out have no challenges.
    labels = np.where(features.groups >= 0, sample.labels[features.groups], -1)
    held_out = (features.kinds == "") & sample.held_out[features.groups]
    challenging, truth = torch.from_numpy(features.kinds != ""), torch.from_numpy(labels)
    labelled = truth >= 0
    temperature, usual = None, labelled & ~challenging
    if usual.sum() >= constants.FEWEST_LABELLED:
        temperature = Temperature.fit(features.logits[usual], truth[usual])
    logits = tempered(features.logits, temperature)
    by_name: Blocks = {**BLOCKS, **{block.name: block for block in blocks}}
    arrays = check_blocks({block.name: features.blocks[block.name] for block in blocks}, by_name, log=base.log)
    read = {name: as_tensor(x) for name, x in arrays.items()}
    groups = groups_of(np.where(features.groups >= 0, sample.sources[features.groups], -1), len(labels))
    table = Table(read, by_name, kinds_of(features.kinds, challenging.numpy()), groups, held_out, base.log)
    fitted = fit_table(base, table, check_random_state(clone(base).random_state))
    log_p, correction, gate, corrected = logits.double().log_softmax(-1), None, None, None
    if options.correct:
        gate = NoisyOr.fit(None, fitted.evidence, challenging, challenging)
        h, odds, own = features.blocks[Features.name], gate.log_odds(fitted.evidence), labelled.numpy()
        known = Labelled(h[own], logits[own], odds[own], truth[own], challenging[own], groups[own])
        correction, log_p[labelled], corrected = choose(known, options.seed, always=options.correct == "always")
    if correction is None:
        gate, extraction = None, extraction.of(blocks)
    risk, why = _risk(log_p, truth, fitted, options.risk)
    for part in (fitted.module, correction, gate, temperature, risk):
        if part is not None:
            part.to(device)
    prices = {block.name: block.price(subject) for block in blocks}
    levels = None
    if sample.pixels is not None:
        limit = fitted.module.threshold()
        first, *others = sample.clean[0].images()
        alike = torch.cat([first, *(x for x in others if x.shape[1:] == first.shape[1:])])

        def flagged(images: Tensor) -> Tensor:
            answers = [fitted.module(extraction(to_device(part, device))[1]) for part in pieces(images, device)]
            return (torch.cat(answers) > limit).cpu()

        levels = sensitivity(alike, sample.pixels, flagged, options.seed)
    report = replace(_report(sample, features, prices, left_out, fitted, why), correction=corrected, levels=levels)
    return Parts(extraction, fitted.module, correction, gate, temperature, risk, report)


def network_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the network's first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _blocks(asked: Sequence[Block] | None, subject: Subject) -> tuple[Sequence[Block], dict[str, str]]:
    """Return the blocks that were asked for, or the default ones that can be served, and why others cannot."""
    blocks = [BLOCKS[name]() for name in DEFAULT_BLOCKS] if asked is None else asked
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
            stacklevel=5,  # whoever calls `TwoStageModel.fit`
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


def _risk(log_p: Tensor, truth: Tensor, fitted: Calibrated, asked: bool | None) -> tuple[Risk | None, str]:
    """Return the risk of answers ``log_p`` ``(n, N)``, from labels ``truth``, and what it was learned from."""
    if asked is False:
        return None, "none: not asked for"
    chosen, kinds = truth >= 0, torch.from_numpy(fitted.table.kinds)
    if not chosen.any():
        return None, "none: no labels" if log_p.shape[1] > 1 else "none: the network has one logit"
    if (usual := int((chosen & (kinds == 0)).sum())) < constants.FEWEST_LABELLED:
        return None, f"none: {usual} labelled clean inputs are too few; it needs {constants.FEWEST_LABELLED}"
    log_p, truth, kinds = log_p[chosen], truth[chosen], kinds[chosen]
    wrong = log_p.argmax(-1) != truth
    known = doubt(log_p), fitted.evidence[chosen], fitted.log_p[chosen]
    risk, clean = Risk.fit(*known, wrong, kinds), kinds == 0
    # The risk was fitted on these answers: if even so it ranks them no better, it does not on new ones.
    suffices = probability_suffices(*(values[clean].numpy() for values in (risk(*known), known[0], wrong)))
    made = int((kinds > 0).sum())
    others = (
        f"and {made} of their challenges, {int(wrong[kinds > 0].sum())} answered wrongly"
        if made
        else "without generated challenges that have labels: unusual inputs do not raise it"
    )
    return risk, f"from {usual} clean inputs, {int(wrong[clean].sum())} answered wrongly; {others}{suffices}"


def _report(
    sample: Sample,
    features: collect.FeatureTable,
    prices: dict[str, float],
    left_out: dict[str, str],
    fitted: Calibrated,
    risk: str,
) -> Report:
    made, counts = np.unique(features.kinds[features.kinds != ""], return_counts=True)
    challenges = dict(zip(made.tolist(), counts.tolist(), strict=True))
    # Challenges of token ids are made without the model.
    names = [name for name in challenges if name in CHALLENGES]
    predicted = 1 + sum(prices.values())
    making = challenge_cost(sample.each, names=names) / sample.each - 1 if sample.each else 0
    return Report(
        prices=prices,
        left_out=left_out,
        drawn=len(sample.labels),
        seen=sum(one.seen for one in sample.clean),
        challenges=challenges,
        passes=predicted + (predicted + making) * sum(challenges.values()) / len(sample.labels),
        calibrating=int(fitted.module.options["sources"]),
        exact=bool(fitted.module.options["exact"]),
        risk=risk,
        normalisation=sample.normalisation,
    )
