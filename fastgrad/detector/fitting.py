"""`TwoStageModel.fit`, step by step: draw, check, read, probabilities, calibrate, risk, price, report."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from torch import Tensor

from fastgrad.batches import batch_size, take, to_device
from fastgrad.blocks import BLOCKS, Block, Features
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.subject import Subject, watch
from fastgrad.challenges import CHALLENGES, challenge_cost
from fastgrad.detector import collect, constants, loaders
from fastgrad.detector.calibrate import Calibrated
from fastgrad.detector.collect import Sample
from fastgrad.detector.estimator import UncertaintyDetector
from fastgrad.detector.price import DEFAULT_BLOCKS, EXTENDED_BLOCKS, EXTENDED_FROM, PriceReport, fit_to_budget
from fastgrad.detector.report import Report, gains
from fastgrad.detector.risk import NoisyOr, Risk, doubt
from fastgrad.engine.fallback import agree
from fastgrad.engine.refusals import refuse_devices
from fastgrad.engine.state import RandomState
from fastgrad.introspection import IntrospectiveClassifier
from fastgrad.introspection.network import IntrospectiveNetwork
from fastgrad.scores.temperature import Temperature

if TYPE_CHECKING:
    from fastgrad.detector.model import TwoStageModel

#: The modules that a fit makes; those that it does not need are None.
FITTED = ("detector", "classifier", "gate", "temperature", "risk")
#: Two computations of a block agree up to its square root: networks in half precision round to some hundredths.
_ROUNDING = 2.5e-3


def fit(two_stage: TwoStageModel, options: loaders.FitOptions) -> None:
    """Fit ``two_stage``, which changes only after everything has worked."""
    refuse_devices(two_stage.model)
    base = two_stage.detector or UncertaintyDetector(log=False, random_state=two_stage.seed)
    clean, given = loaders.draw_all(options, two_stage.seed, base.calibration_fraction)
    device, verbose = two_stage.device, options.verbose
    x = to_device(clean[0].batches[0], device)
    subject = watch(two_stage.model, *arguments(x))
    blocks = _blocks(two_stage, subject)
    sample = loaders.checked(
        clean, given, subject.classes, two_stage.seed, clone(base), options, answered=two_stage.classifier is not None
    )
    reading = [block for block in blocks if block.refusal(subject) is None]
    if two_stage.classifier is not None and all(block.name != Features.name for block in reading):
        reading.append(Features())
    extraction = two_stage._extraction(reading, subject)
    _require_own(extraction, x)
    generated = collect.generated_batches(sample, two_stage.model, device, two_stage.seed, verbose)
    features = collect.read(extraction, device, itertools.chain(collect.drawn_batches(sample, verbose), generated))
    # A challenge has the label of the clean input it was made from; inputs held out have no challenges.
    labels = np.where(features.groups >= 0, sample.labels[features.groups], -1)
    held_out = (features.kinds == "") & sample.held_out[features.groups]
    challenging, labelled = torch.from_numpy(features.kinds != ""), torch.from_numpy(labels >= 0)
    temperature, known = None, labelled & ~challenging
    if known.sum() >= constants.FEWEST_LABELLED:
        temperature = Temperature.fit(features.logits[known], torch.from_numpy(labels)[known]).to(device)
    classifier = _classifier(two_stage, features, labels, sample.fresh)
    # If the classifier was trained on challenges, its share of an answer is learned.
    gated = classifier is not None and bool((challenging & labelled).any())

    @functools.cache
    def complete(names: tuple[str, ...]) -> tuple[TwoStageModel, Calibrated, str]:
        """Return the model with these blocks, what its detector was fitted on, and where its risk comes from."""
        detector: UncertaintyDetector = clone(base)
        calibrated = detector._fit_table(
            {name: features.blocks[name] for name in names},
            challenging.numpy().astype(int),
            kinds=features.kinds,
            held_out=held_out if held_out.any() else None,
            groups=np.where(features.groups >= 0, sample.sources[features.groups], -1),
            known={block.name: block for block in blocks},
        )
        result = copy.copy(two_stage)
        result._modules = dict(two_stage._modules)
        result.extraction_ = extraction.of([one for one in reading if one.name in (*names, Features.name)])
        result.detector_ = calibrated.module.to(device)
        result.classifier_, result.temperature_ = classifier, temperature
        gate = NoisyOr.fit(None, calibrated.evidence, challenging, challenging).to(device) if gated else None
        result.gate_ = gate
        result.risk_, why = _risk(result, features, labels, sample.fresh, calibrated, options.risk)
        return result, calibrated, why

    if two_stage.blocks is None:
        price = fit_to_budget(
            two_stage.model, blocks, x, two_stage.budget, subject=subject,
            answer=lambda some: complete(tuple(block.name for block in some))[0],
        )  # fmt: skip
    else:
        # Blocks that were named are kept at any price.
        names, predicted = tuple(block.name for block in blocks), 1 + sum(block.price(subject) for block in blocks)
        price = PriceReport(names, predicted, math.nan, (), math.inf, math.nan, batch_size(x), math.nan)
    result, calibrated, why = complete(price.blocks)
    result.report_ = _report(sample, features, price, calibrated, why)
    result._gains = functools.partial(gains, calibrated.table, features.kinds)
    for name in ("extraction_", "report_", "_gains", *(f"{name}_" for name in FITTED)):
        setattr(two_stage, name, getattr(result, name))


def _blocks(two_stage: TwoStageModel, subject: Subject) -> list[Block]:
    """Return the blocks that were asked for, or those of the preset."""
    if two_stage.classifier is not None and subject.head is None:
        raise ValueError("the introspective classifier needs a model that ends in a linear layer")
    if two_stage.blocks is None:
        names = EXTENDED_BLOCKS if two_stage.budget >= EXTENDED_FROM else DEFAULT_BLOCKS
        return [BLOCKS[name]() for name in names]  # `fit_to_budget` reports those that cannot be served
    for block in two_stage.blocks:
        why = block.refusal(subject)
        if why is not None:
            possible = ", ".join(repr(name) for name, kind in BLOCKS.items() if kind().refusal(subject) is None)
            raise ValueError(f"blocks must be ones that the network can serve, {possible}; {block.name!r}: {why}")
    return list(two_stage.blocks)


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
    for name, values in whole.items():
        alone = torch.cat([part[name] for part in parts]).float()
        if len(values) != min(8, samples) or alone.shape != values.shape or not agree(alone, values.float(), _ROUNDING):
            raise ValueError(
                f"blocks must hold a row for each sample that is its own; {name!r} has other rows, or other values "
                "with other samples in the batch"
            )


def _classifier(
    two_stage: TwoStageModel, features: collect.Features, labels: NDArray[np.int64], fresh: NDArray[np.bool_]
) -> IntrospectiveNetwork | None:
    """Return the classifier, trained on clean inputs and challenges, and calibrated on others of them."""
    if two_stage.classifier is None:
        return None

    def rows(sources: NDArray[np.bool_]) -> tuple[Tensor, NDArray[np.int64], NDArray[np.intp]]:
        places = np.flatnonzero((labels >= 0) & sources[features.groups])
        # h alone: on three networks of CIFAR-10, contrast rows gained less on challenges.
        return features.blocks[Features.name][torch.from_numpy(places)], labels[places], features.groups[places]

    h, targets, groups = rows(~fresh)
    classifier: IntrospectiveClassifier = clone(two_stage.classifier)
    classifier.fit(h, targets, groups=groups)
    if fresh.any():
        classifier.calibrate(*rows(fresh)[:2])
    return classifier.to_module().to(two_stage.device)


def _risk(
    two_stage: TwoStageModel,
    features: collect.Features,
    labels: NDArray[np.int64],
    fresh: NDArray[np.bool_],
    fitted: Calibrated,
    asked: bool | None,
) -> tuple[Risk | None, str]:
    """Return the risk, from labelled clean inputs that the answer was not trained on and from their challenges."""
    if asked is False:
        return None, "none: not asked for"
    if (labels < 0).all():
        return None, "none: no labels" if features.logits.shape[1] > 1 else "none: the network has one logit"
    usable = (labels >= 0) & fresh[features.groups]
    usual = int((usable & (features.kinds == "")).sum())
    if usual < constants.FEWEST_LABELLED:
        given = f"{usual} labelled clean inputs that the answer was not trained on"
        return None, f"none: {given} are too few; it needs {constants.FEWEST_LABELLED}"
    chosen = torch.from_numpy(usable)
    evidence, device = fitted.evidence[chosen], two_stage.device
    h = features.blocks.get(Features.name)
    h = None if h is None else h[chosen].to(device)
    log_p = two_stage._log_probabilities(features.logits[chosen].to(device), h, evidence.to(device)).cpu()
    truth, kinds = torch.from_numpy(labels)[chosen], torch.from_numpy(fitted.table.kinds)[chosen]
    wrong = log_p.argmax(-1) != truth
    risk = Risk.fit(doubt(log_p), evidence, fitted.log_p[chosen], wrong, kinds)
    alone = features.logits[chosen].argmax(-1) != truth

    def errors(rows: Tensor) -> str:
        # Both are given, because a classifier trained on few inputs answers worse than the network.
        beside = "" if two_stage.classifier_ is None else f", {int(alone[rows].sum())} by the network alone"
        return f"{int(wrong[rows].sum())} answered wrongly{beside}"

    made = int((kinds > 0).sum())
    others = (
        f"and {made} of their challenges, {errors(kinds > 0)}"
        if made
        else "without generated challenges that have labels: unusual inputs do not raise it"
    )
    return risk.to(device), f"from {usual} clean inputs, {errors(kinds == 0)}; {others}"


def _report(sample: Sample, features: collect.Features, price: PriceReport, fitted: Calibrated, risk: str) -> Report:
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
