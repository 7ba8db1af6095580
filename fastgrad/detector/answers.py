"""Probabilities of the answer: the softmax at a temperature, and the introspective classifier where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgrad.blocks import Features
from fastgrad.detector import collect, constants
from fastgrad.detector.calibrate import Calibrated
from fastgrad.detector.risk import NoisyOr
from fastgrad.introspection import IntrospectiveClassifier
from fastgrad.introspection.network import IntrospectiveNetwork
from fastgrad.losses import compute_dtype
from fastgrad.scores.temperature import Temperature

if TYPE_CHECKING:
    from fastgrad.detector.fitting import Sample
    from fastgrad.detector.model import TwoStageModel


class Answers(NamedTuple):
    """What turns logits into probabilities.

    Attributes:
        classifier: The introspective classifier, or None.
        gate: The probability that an input is a challenge: so much the classifier counts; None without challenges.
        temperature: Of the softmax, or None.
    """

    classifier: IntrospectiveNetwork | None
    gate: NoisyOr | None
    temperature: Temperature | None

    def log_probabilities(self, logits: Tensor, h: Tensor | None, evidence: Tensor) -> Tensor:
        """Return log probabilities ``(B, N)``: the network's and the classifier's, mixed by the gate."""
        precise = logits.to(compute_dtype(logits.dtype))
        network = precise if self.temperature is None else self.temperature(precise)
        first = network.log_softmax(-1)
        if self.classifier is None:
            return first
        assert h is not None  # read for it
        second = self.classifier.answer(h.to(precise.dtype), precise).log_softmax(-1)
        if second.shape[1] != first.shape[1]:
            raise ValueError(
                f"classifier must be fitted on every class of the network, {first.shape[1]}; it has {second.shape[1]}"
            )
        if self.gate is None:
            return second
        odds = self.gate.log_odds(evidence).to(first.dtype).unsqueeze(-1)
        return torch.logaddexp(first + logsigmoid(-odds), second + logsigmoid(odds))


def fit_answers(
    two_stage: TwoStageModel, sample: Sample, features: collect.Features
) -> tuple[Answers, NDArray[np.bool_]]:
    """Fit the temperature, and the classifier on clean inputs and challenges with the clean input's label.

    Returns:
        What was fitted, without a gate, and ``(n,)``: the clean inputs that none of it was trained on.
    """
    count, device = len(sample.held_out), two_stage.device
    everything = np.ones(count, bool)
    if sample.labels is None:
        return Answers(None, None, None), everything
    labelled = sample.labels >= 0
    temperature = None
    if labelled.sum() >= constants.FEWEST_LABELLED:
        chosen = torch.from_numpy(labelled)
        temperature = Temperature.fit(features.logits[:count][chosen], torch.from_numpy(sample.labels)[chosen])
        temperature = temperature.to(device)
    if two_stage.classifier is None:
        return Answers(None, None, temperature), everything
    labels = labels_of_rows(sample, features, labelled)

    def places_of(sources: NDArray[np.bool_]) -> NDArray[np.intp]:
        return np.flatnonzero((labels >= 0) & sources[np.maximum(features.groups, 0)])

    def rows(places: NDArray[np.intp]) -> tuple[Tensor, NDArray[np.int64]]:
        # h alone: on challenges the contrast rows gained less, on three networks of CIFAR-10.
        return features.blocks[Features.name][torch.from_numpy(places)], labels[places]

    classes = features.logits.shape[1]
    random = np.random.default_rng(two_stage.seed)
    unseen = labelled & (sample.held_out | (random.random(count) < constants.UNSEEN))
    trained = labelled & ~unseen
    enough = unseen.sum() >= constants.FEWEST_LABELLED and len(np.unique(sample.labels[trained])) == classes
    if not enough:
        unseen, trained = np.zeros(count, bool), labelled
    classifier: IntrospectiveClassifier = clone(two_stage.classifier)
    places = places_of(trained)
    classifier.fit(*rows(places), groups=features.groups[places])
    if enough:
        classifier.calibrate(*rows(places_of(unseen)))
    return Answers(classifier.to_module().to(device), None, temperature), unseen


def gated(
    answers: Answers, sample: Sample, features: collect.Features, calibrated: Calibrated, device: torch.device
) -> Answers:
    """Return the answers with a gate by a detector's evidence, where the classifier was trained on challenges."""
    if answers.classifier is None or sample.labels is None:
        return answers
    challenging = features.kinds != ""
    if not (challenging & (labels_of_rows(sample, features, sample.labels >= 0) >= 0)).any():
        return answers
    unusual = torch.from_numpy(challenging)
    return answers._replace(gate=NoisyOr.fit(None, calibrated.evidence, unusual, unusual).to(device))


def labels_of_rows(sample: Sample, features: collect.Features, counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return each row's label, a challenge's being its source's; -1 where there is none, or it is not counted."""
    assert sample.labels is not None
    source = np.maximum(features.groups, 0)
    return np.where((features.groups >= 0) & counted[source], sample.labels[source], -1)
