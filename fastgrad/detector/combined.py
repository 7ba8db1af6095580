"""The fitted detector as one traceable module: blocks in, minus the logarithm of a p-value out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad.detector import supervised
from fastgrad.scores.conformal import COMBINATIONS, OneSided, TwoSided, meanings, weighted
from fastgrad.scores.fitted import Fitted, Sequence

#: H among the scores, by the name that it has in files.
H = "labels"
#: Parts of the calibration data, of which each in turn is joined by what the scores mean on the others.
_FOLDS = 10


class Part(NamedTuple):
    """A fitted score that has no meaning yet.

    Attributes:
        rows: What it reads of the blocks.
        score: From those rows to ``(B,)``.
        meaning: One-sided, or two-sided for a score that can be too good to be true.
        weight: How much its evidence counts beside the others'.
        relevant: The p-value from which on it counts at all; 1 for every p-value.
    """

    rows: Fitted
    score: Fitted
    meaning: type[OneSided] | type[TwoSided]
    weight: float = 1.0
    relevant: float = 1.0


class Score(Fitted):
    """One score with its meaning: rows, score, conformal map; options ``weight`` and ``relevant`` as in `Part`."""

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


class DetectorModule(Fitted):
    """Every score's p-value, combined, and calibrated once more as a whole.

    Calling it with named blocks of tensors gives ``(B,)`` float64: minus the natural logarithm of the p-value
    that a clean sample would look at least so unusual. Higher is less reliable, and the threshold at a
    false-alarm rate a is -log(a). Where a score is NaN, because a block failed, it is infinite.
    """

    scores: Sequence
    final: OneSided
    calibration: Tensor

    @classmethod
    def fit(
        cls, parts: Mapping[str, Part], raw: Mapping[str, Tensor], *, combine: str, cap: float
    ) -> DetectorModule:
        """Give the scores their meaning on clean data that they were not fitted on.

        The same n samples say what each score means and what their combination means. To the combination each of
        them must look as a new one does: its p-values come from the samples of the other folds alone (the
        cross-conformal predictors of Vovk, 2015), so none helps to call itself usual.

        Args:
            parts: The scores by name.
            raw: By name, what the scores say ``(n,)`` of clean samples in random order, n at least 2; of each by a
                score that was fitted without it.
            combine: A name of `COMBINATIONS`.
            cap: Largest -log p that one score may contribute.

        Raises:
            ValueError: A score is NaN for one of the samples.
        """
        failed = {name: int(own.isnan().sum()) for name, own in raw.items() if own.isnan().any()}
        if failed:
            raise ValueError(
                f"clean samples must have finite scores to calibrate on; these were NaN: {failed}"
            )
        columns = torch.stack([raw[name] for name in parts])
        count = columns.shape[1]

        def meant(chosen: Tensor) -> DetectorModule:
            scores = {
                name: Score(
                    rows=part.rows,
                    score=part.score,
                    meaning=part.meaning.fit(own),
                    weight=part.weight,
                    relevant=part.relevant,
                )
                for (name, part), own in zip(parts.items(), columns[:, chosen], strict=True)
            }
            return cls(scores=Sequence(**scores), combine=combine, cap=float(cap))

        fold = torch.arange(count) % min(_FOLDS, count)
        combined = torch.empty(count, dtype=torch.float64)
        for index in fold.unique():
            combined[fold == index] = meant(fold != index).joined(columns[:, fold == index])
        module = meant(fold >= 0)
        module.add_module("final", OneSided.fit(combined))
        module.register_buffer("calibration", -module.final(combined))
        return module

    @property
    def calibration_scores(self) -> Tensor:
        """Unreliability ``(n,)`` of the clean samples of the calibration, each as if it were new."""
        return self.calibration

    def joined(self, raw: Tensor, *, cap: float | None = None) -> Tensor:
        """The combined statistic ``(B,)`` of every score's ``raw`` values ``(K, B)``, before its own calibration.

        ``cap`` is the detector's own by default.
        """
        log_p, own, weights = self._terms(raw)
        return COMBINATIONS[self.options["combine"]](log_p, own if cap is None else cap, weights)

    def _terms(self, raw: Tensor) -> tuple[Tensor, float, list[float]]:
        """What is combined: log p-values ``(B, K)`` as far as they are relevant, their cap, their weights."""
        log_p = meanings([score.meaning for score in self.scores], raw)
        relevant = [math.log(score.options["relevant"]) for score in self.scores]
        if any(relevant):
            log_p = log_p - log_p.new_tensor(relevant).unsqueeze(1)
        weights = [score.options["weight"] for score in self.scores]
        return log_p.clamp(max=0).t(), self.options["cap"], weights

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Unreliability ``(B,)``, at least 0."""
        return self._unreliability(self.raw(blocks))

    def explain(self, blocks: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What a call gives, and the evidence ``(B,)`` of each block and of H by name, at least 0.

        A block's evidence is the sum over its scores of -log p, as it is combined: above the p-value from which on it
        counts, capped, weighted. All evidence adds up to the statistic that ``combine="fisher"`` calibrates, and
        ``"harmonic"`` too rises with each of it.
        """
        raw = self.raw(blocks)
        evidence: dict[str, Tensor] = {}
        for source, own in zip(self.sources(), weighted(*self._terms(raw)).unbind(-1), strict=True):
            evidence[source] = evidence[source] + own if source in evidence else own
        return self._unreliability(raw), {source: _failed(own) for source, own in evidence.items()}

    def sources(self) -> list[str]:
        """Of each score, the block that it reads, or H's name."""
        return [
            supervised.NAME if name == H else score.rows.options.get("block", name)
            for name, score in zip(self.scores._modules, self.scores, strict=True)
        ]

    def learned(self) -> list[str]:
        """The blocks that H reads; none without H."""
        if H not in self.scores._modules:
            return []
        parts = self.scores.get_submodule(f"{H}.rows.parts").named_children()
        return [rows.options.get("block", name) for name, rows in parts if isinstance(rows, Fitted)]

    def raw(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Every score's values before calibration, ``(K, B)``."""
        return torch.stack([score.raw(blocks) for score in self.scores])

    def _unreliability(self, raw: Tensor) -> Tensor:
        return _failed(-self.final(self.joined(raw)))

    def parts(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each score's own -log p ``(B,)``, by name: what made a sample suspicious."""
        return {name: _failed(-score(blocks)) for name, score in self.scores.named_children()}


def _failed(unreliability: Tensor) -> Tensor:
    """Infinite where it is NaN: a comparison with NaN is false, and would pass for reliable."""
    return torch.where(unreliability.isnan(), torch.inf, unreliability)
