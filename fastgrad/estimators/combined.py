"""The fitted detector as one traceable module: blocks in, minus the logarithm of a p-value out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastgrad.scores.conformal import COMBINATIONS, OneSided
from fastgrad.scores.fitted import Fitted, Sequence


class Score(Fitted):
    """One score with its meaning: rows, score, conformal map.

    Options: ``weight``, how much its evidence counts beside the others'; ``relevant``, the p-value from which on
    it counts at all, 1 for every p-value.
    """

    rows: Fitted
    score: Fitted
    meaning: Fitted

    def raw(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Scores ``(B,)`` before calibration."""
        result: Tensor = self.score(self.rows(blocks))
        return result

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Log p-values ``(B,)``."""
        result: Tensor = self.meaning(self.raw(blocks))
        return result

    def evidence(self, log_p: Tensor) -> Tensor:
        """What of log p-values ``(B,)`` counts in a combination, at most 0."""
        return (log_p - math.log(self.options["relevant"])).clamp(max=0)


class DetectorModule(Fitted):
    """Every score's p-value, combined, and calibrated once more as a whole.

    Calling it with named blocks of tensors gives ``(B,)`` float64: minus the natural logarithm of the p-value
    that a clean sample would look at least so unusual. Higher is less reliable, and the threshold at a
    false-alarm rate a is -log(a).
    """

    scores: Sequence
    final: OneSided

    def combined(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """The combined statistic ``(B,)`` before its own calibration."""
        log_p = torch.stack([score.evidence(score(blocks)) for score in self.scores], -1)
        weights = [score.options["weight"] for score in self.scores]
        return COMBINATIONS[self.options["combine"]](log_p, self.options["cap"], weights)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Unreliability ``(B,)``, at least 0."""
        result: Tensor = -self.final(self.combined(blocks))
        return result

    def parts(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each score's own -log p ``(B,)``, by name: what made a sample suspicious."""
        return {name: -score(blocks) for name, score in self.scores.named_children()}
