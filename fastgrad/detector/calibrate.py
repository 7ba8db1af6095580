"""Turn scores into one calibrated uncertainty: p-values by folds, their weighted sum, and the p-value of the sum.

The sum is calibrated in one of two ways.

*Split*: on clean inputs on which nothing was fitted and nothing chosen. The p-value of a new clean one is below a with
probability a, for every multiple a of ``1 / (n + 1)`` (split conformal prediction: Papadopoulos et al., 2002; Vovk,
Gammerman and Shafer, 2005). This is exact for all scores, except where they nearly coincide: there p-values are raised
(`fastgrad.scores.conformal.STEEPEST`), and fewer are below a.

*Folds and refit*, if there are too few inputs to hold any out: each clean input is scored by a fit without its fold,
and new inputs by a fit on all. An input's p-values before the sum come from the inputs of the other folds. For stable
scores the error vanishes as n grows (Steinberger and Leeb, "Conditional predictive inference for stable algorithms",
2023). For few inputs it is usually conservative: a fit on more inputs makes a clean one look less unusual (Barber,
Candes, Ramdas and Tibshirani, "Predictive inference with the jackknife+", 2021, compare both).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad import checks
from fastgrad.blocks.block import CHALLENGE_CLASSIFIER, Settings
from fastgrad.detector.challenge_classifier import ChallengeClassifier, JointRows
from fastgrad.detector.constants import CAP, WEIGHT
from fastgrad.detector.inputs import Blocks, take
from fastgrad.scores.conformal import PValues, weighted
from fastgrad.scores.fitted import Fitted, FittedList


class Score(Fitted):
    """One score: the rows that it reads from the blocks, and the module that scores them.

    Options: ``source``, the block or `CHALLENGE_CLASSIFIER`; ``weight``, the factor of its evidence in the sum.
    """

    rows: Fitted
    score: Fitted

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return scores ``(B,)`` before calibration, or the challenge classifier's log probabilities ``(B, C)``."""
        result: Tensor = self.score(self.rows(blocks))
        return result


class DetectorModule(Fitted):
    """Every score's p-value, the weighted sum of their logarithms, and the p-value of the sum.

    Calling it with named blocks returns the uncertainty ``(B,)``, float64: -log of the probability that a clean sample
    looks at least this unusual. It is infinite if a score is NaN because a block failed.
    """

    scores: FittedList
    p_values: PValues
    final: PValues
    calibration_scores: Tensor

    def evidence(self, raw: Tensor, *, cap: float = CAP) -> Tensor:
        """Return the weighted -log p, capped before weighting, ``(B, K)``, of all scores' ``raw`` values ``(K, B)``."""
        return weighted(self.p_values(raw).t(), cap, [score.options["weight"] for score in self.scores])

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return the uncertainty ``(B,)``, at least 0."""
        return self.explain(blocks)[0]

    def explain(self, blocks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return uncertainty ``(B,)``, evidence ``(B, S)`` of `sources`, log p ``(B, C)`` of "clean" and challenges."""
        raw, log_p = values_of(self.scores, blocks)
        evidence = self.evidence(raw)
        # A comparison with NaN is false, so NaN would pass for reliable.
        total, parts = (
            v.nan_to_num(torch.inf, torch.inf, -torch.inf) for v in (self.total(evidence), self.by_source(evidence))
        )
        return total, parts, log_p

    def total(self, evidence: Tensor) -> Tensor:
        """Return -log p ``(B,)`` of the sum of ``evidence`` ``(B, K)``."""
        log_p: Tensor = self.final(evidence.sum(-1).unsqueeze(0))
        return -log_p.squeeze(0)

    @property
    def sources(self) -> list[str]:
        """The blocks that have a score, and the challenge classifier if there is one."""
        return list(dict.fromkeys(score.options["source"] for score in self.scores))

    def by_source(self, evidence: Tensor) -> Tensor:
        """Return the scores' evidence ``(B, K)`` summed by source, ``(B, S)``."""
        each = [score.options["source"] for score in self.scores]
        columns: dict[str, Tensor] = {}
        for source, column in zip(each, evidence.unbind(-1), strict=True):
            columns[source] = columns[source] + column if source in columns else column
        return torch.stack(list(columns.values()), -1)

    def classifier_blocks(self) -> list[str]:
        """Return the blocks that the challenge classifier reads; none if there is no such classifier."""
        if CHALLENGE_CLASSIFIER not in self.scores._modules:
            return []
        return [name for name, _ in self.scores.get_submodule(f"{CHALLENGE_CLASSIFIER}.rows.parts").named_children()]

    def threshold(self, false_alarm_rate: float | None = None) -> float:
        """Return -log of the rate, by default the estimator's in `fit`; warn if too few inputs calibrate for it."""
        rate = self.options["false_alarm_rate"] if false_alarm_rate is None else false_alarm_rate
        checks.lies_in("(0, 1)", false_alarm_rate=rate)
        n = self.options["sources"]
        if rate < 1 / (n + 1):
            warnings.warn(
                f"false_alarm_rate={rate:g} is below what {n} calibration inputs can promise, {1 / (n + 1):.2g}: the "
                "threshold is extrapolated",
                RuntimeWarning,
                stacklevel=3,
            )
        return -float(np.log(rate))


def values_of(scores: Iterable[Score], blocks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return K scores ``(K, B)``, and the challenge classifier's log probabilities ``(B, C)``; C is 0 without one."""
    values: list[Tensor] = []
    log_p = None
    for score in scores:
        value: Tensor = score(blocks)
        if score.options["source"] == CHALLENGE_CLASSIFIER:
            value, log_p = -value[:, 0], value
        values.append(value)
    raw = torch.stack(values)
    return raw, raw.new_empty(raw.shape[1], 0) if log_p is None else log_p


@dataclass(frozen=True)
class Table:
    """Blocks of clean samples and challenges, n in all."""

    blocks: dict[str, Tensor]  # (n, ...) by name
    known: Blocks  # the blocks by name, which define how each is scored
    kinds: NDArray[np.intp]  # (n,): 0 for clean samples, 1 and up for kinds of challenge
    groups: NDArray[np.intp]  # (n,): the source of each; a challenge has that of the clean sample it was made from
    held_out: NDArray[np.bool_]  # (n,): clean samples that only calibrate the sum
    log: bool  # whether to take the logarithms of squared norms

    @property
    def classes(self) -> int:
        """Number of classes: clean, and each kind of challenge."""
        return int(self.kinds.max()) + 1


class Calibrated(NamedTuple):
    """A detector and what it was fitted on.

    ``evidence`` ``(n, S)`` and ``log_p`` ``(n, C)`` are what `DetectorModule.explain` returns for every sample of the
    table, from a fit without the sample and its source. C is 0 without a challenge classifier.
    """

    module: DetectorModule
    evidence: Tensor
    log_p: Tensor
    table: Table


def fit_scores(table: Table, chosen: NDArray[np.bool_], count: int) -> dict[str, Score]:
    """Fit the scores of all blocks on the clean samples among the ``chosen``, and the challenge classifier on all."""
    settings = Settings(table.log, count)
    clean = {name: values.numpy() for name, values in take(table.blocks, chosen & (table.kinds == 0)).items()}
    scores: dict[str, Score] = {}
    for source in clean:
        for name, rows, score in table.known[source].scores(clean, settings):
            if name in scores:
                raise ValueError(f"blocks must name their scores apart; {source!r} and another one both have {name!r}")
            scores[name] = Score(rows=rows, score=score, source=source, weight=1.0)
    if (chosen & (table.kinds > 0)).any():
        joint = JointRows(parts=FittedList(**{name: table.known[name].joint(clean, settings) for name in clean}))
        joined = torch.cat([joint(take(table.blocks, part)).float() for part in _parts(chosen)])
        classifier = ChallengeClassifier.fit(joined, table.kinds[chosen], table.classes)
        scores[CHALLENGE_CLASSIFIER] = Score(rows=joint, score=classifier, source=CHALLENGE_CLASSIFIER, weight=WEIGHT)
    return scores


def assign_folds(table: Table, folds: int, random: np.random.RandomState) -> NDArray[np.intp]:
    """Return the fold ``(n,)`` of each sample, one fold per source; -1 for the sources of samples held out."""
    apart = np.isin(table.groups, table.groups[table.held_out])
    clean = np.unique(table.groups[(table.kinds == 0) & ~apart])
    if len(clean) < 2:
        raise ValueError(f"groups must have at least 2 sources of clean samples; there was {len(clean)}")
    # A fit needs two samples.
    count = len(clean) if len(clean) - -(-len(clean) // folds) < 2 else min(folds, len(clean))
    others = np.setdiff1d(np.unique(table.groups), clean)
    fold = np.full(int(table.groups.max()) + 1, -1)
    for sources in (clean, others):
        fold[random.permutation(sources)] = np.arange(len(sources)) % count
    folded = np.where(apart, -1, fold[table.groups])
    challenged = folded[table.kinds > 0]
    if len(challenged) and len(np.setdiff1d(challenged, [-1])) < 2:
        raise ValueError(
            "challenges must come from more sources, so that those of one fold leave some to fit on; "
            f"the {len(challenged)} left none"
        )
    return folded


def with_p_values(scores: Mapping[str, Score], raw: Tensor, counted: NDArray[np.bool_]) -> DetectorModule:
    """Return a detector with p-values among the ``counted`` of ``raw`` scores ``(K, n)``; its sum is uncalibrated."""
    two_sided = [bool(score.score.options.get("two_sided")) for score in scores.values()]
    p_values = PValues.fit(raw[:, torch.from_numpy(counted)], two_sided)
    return DetectorModule(scores=FittedList(**scores), p_values=p_values)


def fit_detector(table: Table, folds: int, random: np.random.RandomState) -> Calibrated:
    """Fit scores by folds and once more on all folds, and calibrate their sum."""
    fold = assign_folds(table, folds, random)
    fitting, clean = fold >= 0, table.kinds == 0
    # A fit without a fold scores that fold; the fit on all folds, number -1, scores samples in none and new samples.
    fits = {number: fitting & (fold != number) for number in range(fold.max() + 1)} | {-1: fitting}
    smallest = min(int((clean & chosen).sum()) for chosen in fits.values())
    if smallest < 2:
        raise ValueError(f"groups must leave 2 clean samples of other sources to each fold; they left {smallest}")
    fitted = {number: fit_scores(table, chosen, smallest) for number, chosen in fits.items()}
    final = {name: score for name, score in fitted[-1].items() if all(name in scores for scores in fitted.values())}
    if not final:
        raise ValueError("blocks must have at least one score, or there must be challenges; there was neither")
    raw = torch.full((len(final), len(fold)), torch.nan, dtype=torch.float64, device="cpu")
    log_p = raw.new_empty(len(fold), table.classes if CHALLENGE_CLASSIFIER in final else 0)
    for number, scores in fitted.items():
        for part in _parts(fold == number) if (fold == number).any() else ():
            raw[:, part], log_p[part] = values_of([scores[name] for name in final], take(table.blocks, part))
    missing = raw[:, torch.from_numpy(clean)].isnan().sum(1).tolist()
    if failed := {name: count for name, count in zip(final, missing, strict=True) if count}:
        raise ValueError(f"clean samples must have finite scores to calibrate on; these were NaN: {failed}")
    # p-values come from the clean samples of the other folds, so that no sample makes itself look usual.
    evidence = raw.new_empty(len(fold), len(final))
    modules = {number: with_p_values(final, raw, clean & chosen) for number, chosen in fits.items()}
    for number, others in modules.items():
        rows = torch.from_numpy(fold == number)
        evidence[rows] = others.evidence(raw[:, rows])
    module = modules[-1]
    # The p-value of the sum is counted on the samples held out, or else on every clean sample.
    calibrates = table.held_out if table.held_out.any() else clean & fitting
    calibrating = evidence[torch.from_numpy(calibrates)]
    module.add_module("final", PValues.fit(calibrating.sum(-1).unsqueeze(0), [False], counted=True))
    module.register_buffer("calibration_scores", module.total(calibrating))
    module.options["exact"] = bool(table.held_out.any())
    # Samples of one source may be alike, so only one of each source counts for the smallest rate that can be promised.
    module.options["sources"] = len(np.unique(table.groups[calibrates]))
    return Calibrated(module.eval(), module.by_source(evidence), log_p, table)


def _parts(chosen: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Return the chosen places, some at a time, so that a large set needs little memory."""
    return np.array_split(np.flatnonzero(chosen), -(-int(chosen.sum()) // 1024))
