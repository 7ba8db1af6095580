"""`TwoStageModel.fit`, step by step: draw, check, read, probabilities, price, calibrate, risk, report."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor, nn

from fastgrad.batches import batch_size, take, to_device
from fastgrad.blocks import BLOCKS, Block, Features
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.subject import Subject, watch
from fastgrad.challenges import CHALLENGES, challenge_cost
from fastgrad.checks import groups_of
from fastgrad.detector import collect, constants, loaders
from fastgrad.detector.calibrate import Calibrated, DetectorModule, Table
from fastgrad.detector.collect import Sample
from fastgrad.detector.estimator import UncertaintyDetector, fit_table
from fastgrad.detector.inputs import Blocks, check_blocks, kinds_of
from fastgrad.detector.price import DEFAULT_BLOCKS, EXTENDED_BLOCKS, EXTENDED_FROM, PriceReport, fit_to_budget
from fastgrad.detector.report import Gain, Report, gains, probability_suffices
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
    gains: Callable[[], dict[str, Gain]] | None = None


def fit(
    model: nn.Module,
    detector: UncertaintyDetector | None,
    asked: Sequence[Block] | None,
    options: loaders.FitOptions,
    answer: Callable[[Parts], Callable[[Inputs], object]],
) -> Parts:
    """Fit with the blocks that were ``asked`` for, or with as many of the preset's as fit the budget.

    ``answer`` returns how a two-stage model would answer with some parts, to measure the price.
    """
    refuse_devices(model)
    base = detector or UncertaintyDetector(log=False, random_state=options.seed)
    clean, given = loaders.draw_all(options, base.calibration_fraction)
    device, verbose = device_of(model), options.verbose
    x = to_device(clean[0].batches[0], device)
    subject = watch(model, *arguments(x))
    blocks = _blocks(asked, options.budget, subject)
    if options.correct and subject.head is None:
        raise ValueError("correct=True needs a model that ends in a linear layer")
    sample = loaders.build_sample(clean, given, subject.classes, clone(base), options)
    served = [block for block in blocks if block.refusal(subject) is None]
    # The correction reads h, also where the detector does not.
    added = [Features()] if options.correct and all(block.name != Features.name for block in served) else []
    # Logarithms of norms cannot underflow, but the user's detector may expect the norms themselves.
    extraction = Extraction(model, [*served, *added], log=not base.log, known=subject)
    generated = collect.generated_batches(sample, model, device, options.seed, verbose)
    _require_own(extraction, x)
    features = collect.read(extraction, device, itertools.chain(collect.drawn_batches(sample, verbose), generated))
    # A challenge has the label of the clean input it was made from; inputs held out have no challenges.
    labels = np.where(features.groups >= 0, sample.labels[features.groups], -1)
    held_out = (features.kinds == "") & sample.held_out[features.groups]
    challenging, truth = torch.from_numpy(features.kinds != ""), torch.from_numpy(labels)
    labelled = truth >= 0
    temperature, known = None, labelled & ~challenging
    if known.sum() >= constants.FEWEST_LABELLED:
        temperature = Temperature.fit(features.logits[known], truth[known])
    logits = tempered(features.logits, temperature)
    by_name: Blocks = {**BLOCKS, **{block.name: block for block in blocks}}
    arrays = check_blocks({block.name: features.blocks[block.name] for block in served}, by_name, log=base.log)
    groups = groups_of(np.where(features.groups >= 0, sample.sources[features.groups], -1), len(labels))
    kinds, read = kinds_of(features.kinds, challenging.numpy()), {name: as_tensor(x) for name, x in arrays.items()}

    def complete(names: tuple[str, ...], *, draft: bool) -> tuple[Parts, Calibrated, tuple[str, str | None]]:
        """Return parts with these blocks, what their detector was fitted on, and words about risk and correction."""
        some = {name: value for name, value in read.items() if name in names}
        table = Table(some, by_name, kinds, groups, held_out, base.log)
        fitted = fit_table(base, table, check_random_state(clone(base).random_state), draft=draft)
        gate = NoisyOr.fit(None, fitted.evidence, challenging, challenging) if options.correct else None
        log_p, correction, corrected, kept = logits.double().log_softmax(-1), None, None, list(names)
        if gate is not None:
            h, odds, own = features.blocks[Features.name], gate.log_odds(fitted.evidence), labelled.numpy()
            given = Labelled(h[own], logits[own], odds[own], truth[own], challenging[own], groups[own])
            correction, log_p[labelled], corrected = choose(
                given, options.seed, always=options.correct == "always", draft=draft
            )
            gate, kept = (None, kept) if correction is None else (gate, [*kept, Features.name])
        risk, why = _risk(log_p, truth, fitted, options.risk)
        for part in (fitted.module, correction, gate, temperature, risk):
            if part is not None:
                part.to(device)
        own_extraction = extraction.of([block for block in extraction.blocks if block.name in kept])
        parts = Parts(own_extraction, fitted.module, correction, gate, temperature, risk)
        return parts, fitted, (why, corrected)

    if asked is None:
        price = fit_to_budget(
            model, blocks, x, options.budget, subject=subject,
            answer=lambda some: answer(complete(tuple(block.name for block in some), draft=True)[0]),
        )  # fmt: skip
    else:
        # Blocks that were named are kept at any price.
        names, predicted = tuple(block.name for block in blocks), 1 + sum(block.price(subject) for block in blocks)
        price = PriceReport(names, predicted, math.nan, (), math.inf, math.nan, batch_size(x), math.nan)
    parts, fitted, (why, corrected) = complete(price.blocks, draft=False)
    report = replace(_report(sample, features, price, fitted, why), correction=corrected)
    return replace(parts, report=report, gains=functools.partial(gains, fitted.table, features.kinds))


def _blocks(asked: Sequence[Block] | None, budget: float, subject: Subject) -> Sequence[Block]:
    """Return the blocks that were asked for, or those of the preset."""
    if asked is None:
        # `fit_to_budget` reports those that cannot be served.
        return [BLOCKS[name]() for name in (EXTENDED_BLOCKS if budget >= EXTENDED_FROM else DEFAULT_BLOCKS)]
    for block in asked:
        if (why := block.refusal(subject)) is not None:
            possible = ", ".join(repr(name) for name, kind in BLOCKS.items() if kind().refusal(subject) is None)
            raise ValueError(f"blocks must be ones that the network can serve, {possible}; {block.name!r}: {why}")
    return asked


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
    sample: Sample, features: collect.FeatureTable, price: PriceReport, fitted: Calibrated, risk: str
) -> Report:
    made, counts = np.unique(features.kinds[features.kinds != ""], return_counts=True)
    challenges = dict(zip(made.tolist(), counts.tolist(), strict=True))
    # Challenges of token ids are made without the model.
    names = [name for name in challenges if name in CHALLENGES]
    making = challenge_cost(sample.each, names=names) / sample.each - 1 if sample.each else 0
    return Report(
        price=price,
        drawn=len(sample.labels),
        seen=sum(one.seen for one in sample.clean),
        challenges=challenges,
        passes=price.predicted + (price.predicted + making) * sum(challenges.values()) / len(sample.labels),
        calibrating=int(fitted.module.options["sources"]),
        exact=bool(fitted.module.options["exact"]),
        risk=risk,
        normalisation=sample.normalisation,
    )
