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
from fastgrad.detector.risk import NoisyOr
from fastgrad.introspection import IntrospectiveClassifier
from fastgrad.introspection.network import IntrospectiveNetwork
from fastgrad.losses import compute_dtype
from fastgrad.scores.temperature import Temperature

if TYPE_CHECKING:
    from fastgrad.detector.model import TwoStageModel


class Answers(NamedTuple):
    """What turns logits into probabilities; ``gate`` is how much the introspective classifier counts, None for all."""

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

    def gated(
        self, features: collect.Features, labels: NDArray[np.int64], evidence: Tensor, device: torch.device
    ) -> Answers:
        """Return the same with a gate by a detector's evidence, where the classifier was trained on challenges."""
        challenging = features.kinds != ""
        if self.classifier is None or not (challenging & (labels >= 0)).any():
            return self
        unusual = torch.from_numpy(challenging)
        return self._replace(gate=NoisyOr.fit(None, evidence, unusual, unusual).to(device))


def fit_answers(
    two_stage: TwoStageModel, features: collect.Features, labels: NDArray[np.int64], held_out: NDArray[np.bool_]
) -> tuple[Answers, NDArray[np.bool_]]:
    """Fit the temperature, and the classifier on clean inputs and challenges; what is ``held_out`` calibrates it.

    ``labels`` ``(n,)`` are -1 for none. Returns what was fitted, without a gate, and which clean inputs trained none of
    it.
    """
    count = int((features.kinds == "").sum())
    clean_labels = labels[:count]
    labelled, everything = clean_labels >= 0, np.ones(count, bool)
    temperature = None
    if labelled.sum() >= constants.FEWEST_LABELLED:
        chosen = torch.from_numpy(labelled)
        temperature = Temperature.fit(features.logits[:count][chosen], torch.from_numpy(clean_labels)[chosen])
        temperature = temperature.to(two_stage.device)
    if two_stage.classifier is None:
        return Answers(None, None, temperature), everything
    random = np.random.default_rng(two_stage.seed)
    unseen = labelled & (held_out[:count] | (random.random(count) < constants.UNSEEN))
    trained = labelled & ~unseen
    classes = features.logits.shape[1]
    enough = unseen.sum() >= constants.FEWEST_LABELLED and len(np.unique(clean_labels[trained])) == classes
    if not enough:
        unseen, trained = ~everything, labelled

    def rows(sources: NDArray[np.bool_]) -> tuple[Tensor, NDArray[np.int64], NDArray[np.intp]]:
        places = np.flatnonzero((labels >= 0) & sources[features.groups])
        # h alone: on challenges the contrast rows gained less, on three networks of CIFAR-10.
        return features.blocks[Features.name][torch.from_numpy(places)], labels[places], features.groups[places]

    h, targets, groups = rows(trained)
    classifier: IntrospectiveClassifier = clone(two_stage.classifier)
    classifier.fit(h, targets, groups=groups)
    if enough:
        classifier.calibrate(*rows(unseen)[:2])
    return Answers(classifier.to_module().to(two_stage.device), None, temperature), unseen
