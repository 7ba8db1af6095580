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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgrad import checks
from fastgrad.blocks.block import CHALLENGE_CLASSIFIER
from fastgrad.blocks.features import Features
from fastgrad.detector.challenge_classifier import ChallengeClassifier, JointRows
from fastgrad.detector.constants import CAP, WEIGHT
from fastgrad.detector.inputs import BlocksByName
from fastgrad.scores.conformal import PValues, weighted
from fastgrad.scores.fitted import Fitted, FittedList
from fastgrad.scores.one_class import Settings


class Score(Fitted):
    """One score: the rows that it reads from the blocks, and the module that scores them.

    Options: ``evidence``, the block or `CHALLENGE_CLASSIFIER`; ``weight``, the factor of its evidence in the sum.
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
        """Return uncertainty ``(B,)``, evidence ``(B, S)`` by name, and log p ``(B, C)`` of "clean" and challenges."""
        raw, log_p = values_of(self.scores, blocks)
        evidence = self.evidence(raw)
        # A comparison with NaN is false, so NaN would pass for reliable.
        total, parts = (
            v.nan_to_num(torch.inf, torch.inf, -torch.inf) for v in (self.total(evidence), self.summed(evidence))
        )
        return total, parts, log_p

    def total(self, evidence: Tensor) -> Tensor:
        """Return -log p ``(B,)`` of the sum of ``evidence`` ``(B, K)``."""
        log_p: Tensor = self.final(evidence.sum(-1).unsqueeze(0))
        return -log_p.squeeze(0)

    @property
    def evidence_names(self) -> list[str]:
        """The blocks that have a score, and the challenge classifier if there is one."""
        return list(dict.fromkeys(score.options["evidence"] for score in self.scores))

    def summed(self, evidence: Tensor) -> Tensor:
        """Return the scores' evidence ``(B, K)`` summed by `evidence_names`, ``(B, S)``."""
        each = [score.options["evidence"] for score in self.scores]
        columns: dict[str, Tensor] = {}
        for name, column in zip(each, evidence.unbind(-1), strict=True):
            columns[name] = columns[name] + column if name in columns else column
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
        if score.options["evidence"] == CHALLENGE_CLASSIFIER:
            value, log_p = -value[:, 0], value
        values.append(value)
    raw = torch.stack(values)
    return raw, raw.new_empty(raw.shape[1], 0) if log_p is None else log_p


class Calibrated(NamedTuple):
    """A detector, and what fits without each sample say about it.

    ``evidence`` ``(n, S)`` and ``log_p`` ``(n, C)`` are what `DetectorModule.explain` returns for every sample, from a
    fit without the sample and its source. C is 0 without a challenge classifier.
    """

    module: DetectorModule
    evidence: Tensor
    log_p: Tensor


def fit_scores(features: Features, chosen: Tensor, by_name: BlocksByName, count: int, *, log: bool) -> dict[str, Score]:
    """Fit the scores of all blocks on the clean samples among the ``chosen``, and the challenge classifier on all."""
    codes = features.codes
    clean = take(features.blocks, chosen & (codes == 0))
    scores: dict[str, Score] = {}
    for block in clean:
        own = Settings(by_name[block].squared_norms, log, count)
        for part in (fit(block, clean, own) for fit in by_name[block].scores):
            if part is None:
                continue
            name, rows, score = part
            if name in scores:
                raise ValueError(f"blocks must name their scores apart; {block!r} and another one both have {name!r}")
            scores[name] = Score(rows=rows, score=score, evidence=block, weight=1.0)
    if (chosen & (codes > 0)).any():
        seen = {
            name: Settings(by_name[name].squared_norms, log, count).rows(name, clean, **by_name[name].classified)
            for name in clean
        }
        joint = JointRows(parts=FittedList(**seen))
        joined = torch.cat([joint(take(features.blocks, part)).float() for part in _parts(chosen)])
        classifier = ChallengeClassifier.fit(joined, codes[chosen], int(codes.max()) + 1)
        scores[CHALLENGE_CLASSIFIER] = Score(rows=joint, score=classifier, evidence=CHALLENGE_CLASSIFIER, weight=WEIGHT)
    return scores


def assign_folds(features: Features, folds: int, random: np.random.RandomState) -> Tensor:
    """Return the fold ``(n,)`` of each sample, one fold per source; -1 for the sources of samples held out."""
    sources, challenging = features.source_numbers, features.challenging
    apart = torch.isin(sources, sources[features.held_out])
    clean = sources[~challenging & ~apart].unique().numpy()
    if len(clean) < 2:
        raise ValueError(f"sources must have at least 2 of clean samples; there was {len(clean)}")
    # A fit needs two samples.
    count = len(clean) if len(clean) - -(-len(clean) // folds) < 2 else min(folds, len(clean))
    others = np.setdiff1d(sources.unique().numpy(), clean)
    fold = torch.full((int(sources.max()) + 1,), -1, dtype=torch.int64, device="cpu")
    for part in (clean, others):
        fold[torch.from_numpy(random.permutation(part))] = torch.arange(len(part), device="cpu") % count
    folded = fold[sources].masked_fill(apart, -1)
    challenged = folded[challenging]
    if len(challenged) and len(challenged[challenged >= 0].unique()) < 2:
        raise ValueError(
            "challenges must come from more sources, so that those of one fold leave some to fit on; "
            f"the {len(challenged)} left none"
        )
    return folded


def with_p_values(scores: Mapping[str, Score], raw: Tensor, counted: Tensor) -> DetectorModule:
    """Return a detector with p-values among the ``counted`` of ``raw`` scores ``(K, n)``; its sum is uncalibrated."""
    two_sided = [bool(score.score.options.get("two_sided")) for score in scores.values()]
    p_values = PValues.fit(raw[:, counted], two_sided)
    return DetectorModule(scores=FittedList(**scores), p_values=p_values)


def calibrate(
    features: Features, by_name: BlocksByName, folds: int, random: np.random.RandomState, *, log: bool
) -> Calibrated:
    """Fit scores by folds and once more on all folds, and calibrate their sum; ``log`` takes logarithms of norms."""
    fold = assign_folds(features, folds, random)
    fitting, clean = fold >= 0, ~features.challenging
    # A fit without a fold scores that fold; the fit on all folds, number -1, scores samples in none and new samples.
    fits = {number: fitting & (fold != number) for number in range(int(fold.max()) + 1)} | {-1: fitting}
    smallest = min(int((clean & chosen).sum()) for chosen in fits.values())
    if smallest < 2:
        raise ValueError(f"sources must leave 2 clean samples of other sources to each fold; they left {smallest}")
    fitted = {number: fit_scores(features, chosen, by_name, smallest, log=log) for number, chosen in fits.items()}
    final = {name: score for name, score in fitted[-1].items() if all(name in scores for scores in fitted.values())}
    if not final:
        raise ValueError("blocks must have at least one score, or there must be challenges; there was neither")
    raw = torch.full((len(final), len(fold)), torch.nan, dtype=torch.float64, device="cpu")
    kinds = int(features.codes.max()) + 1
    log_p = raw.new_empty(len(fold), kinds if CHALLENGE_CLASSIFIER in final else 0)
    for number, scores in fitted.items():
        for part in _parts(fold == number) if (fold == number).any() else ():
            raw[:, part], log_p[part] = values_of([scores[name] for name in final], take(features.blocks, part))
    missing = raw[:, clean].isnan().sum(1).tolist()
    if failed := {name: count for name, count in zip(final, missing, strict=True) if count}:
        raise ValueError(f"clean samples must have finite scores to calibrate on; these were NaN: {failed}")
    # p-values come from the clean samples of the other folds, so that no sample makes itself look usual.
    evidence = raw.new_empty(len(fold), len(final))
    modules = {number: with_p_values(final, raw, clean & chosen) for number, chosen in fits.items()}
    for number, others in modules.items():
        rows = fold == number
        evidence[rows] = others.evidence(raw[:, rows])
    module = modules[-1]
    # The p-value of the sum is counted on the samples held out, or else on every clean sample.
    exact = bool(features.held_out.any())
    calibrates = features.held_out if exact else clean & fitting
    calibrating = evidence[calibrates]
    module.add_module("final", PValues.fit(calibrating.sum(-1).unsqueeze(0), [False], counted=True))
    module.register_buffer("calibration_scores", module.total(calibrating))
    module.options["exact"] = exact
    # Samples of one source may be alike, so only one of each source counts for the smallest rate that can be promised.
    module.options["sources"] = len(features.source_numbers[calibrates].unique())
    return Calibrated(module.eval(), module.summed(evidence), log_p)


def take(blocks: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the rows of every block."""
    return {name: values[rows] for name, values in blocks.items()}


def _parts(chosen: Tensor) -> tuple[Tensor, ...]:
    """Return the chosen places, some at a time, so that a large set needs little memory."""
    return chosen.nonzero()[:, 0].tensor_split(-(-int(chosen.sum()) // 1024))
