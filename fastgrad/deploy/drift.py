"""Drift: has the incoming data left the training distribution?

The monitor reads a stream of uncertainty scores, one per image, and raises an alarm with a stated error rate:

- Every score becomes a *conformal p-value*, its randomised rank among the calibration scores and all earlier scores.
  While the stream is exchangeable with the calibration images, these p-values are independent and uniform, whatever
  the distribution of the scores (Vovk, Nouretdinov & Gammerman, ICML 2003).
- A family of Beta densities *bets* against uniformity: each multiplies its capital by its density at the p-value.
  Under uniformity, no bet gains on average. High scores, low scores, both tails, and a pile-up in one place each make
  some bets grow exponentially.
- A new share of capital starts at every image, so late changes are found, too. With ``form="ever"`` the shares shrink,
  so the delay grows with the logarithm of the number of images before the change.

``form="ever"``: the total capital is a martingale that starts at 1. By Ville's inequality, the probability of *ever*
raising a false alarm, on a stream of any length, is at most ``false_alarm_rate``.
``form="average"``: the Shiryaev-Roberts sum over start times. The *average* number of images before a false alarm is
at least ``1 / false_alarm_rate`` (Shin, Ramdas & Rinaldo 2023), and delays are shorter. Reset it after each alarm.

Both forms need images that could have come in any order. Frames of a video could not: take every k-th, or one per
scene. Memory and time per score do not grow with the stream.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from fastgrad import checks
from fastgrad.checks import Array
from fastgrad.deploy.error_rate import FEWEST, ErrorRate, check_limit, error_rate

# Beta(a, b) shapes. a < 1 grows on small p-values (high scores), b < 1 on large ones (low scores), both on both tails,
# and both above 1 on a pile-up in the middle. Small exponents find extreme shifts in a few images, exponents near 1
# slight shifts in many.
_BETS = np.array(
    [(k, 1.0) for k in (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)]
    + [(1.0, k) for k in (0.3, 0.5, 0.7, 0.9)]
    + [(k, k) for k in (0.4, 0.7, 2.0, 6.0)]
)
_LOG_NORMALIZER = np.array([math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) for a, b in _BETS])
# Most of the prior goes to high scores: drift usually raises the uncertainty, slightly or strongly.
_PRIOR = np.array([0.6 / 6] * 6 + [0.2 / 4] * 4 + [0.2 / 4] * 4)
_LARGEST = 1e300


@dataclass(frozen=True)
class ScoreReference:
    """In-distribution scores as the counts of ``K`` bins.

    Attributes:
        edges: ``(K - 1,)``, increasing inner bin edges; bin ``i`` holds ``edges[i-1] <= score < edges[i]``.
        counts: ``(K,)``, the number of calibration scores in each bin.
    """

    edges: Array
    counts: Array

    def __post_init__(self) -> None:
        edges, counts = checks.to_array("edges", self.edges), checks.to_array("counts", self.counts)
        if edges.ndim != 1 or (np.diff(edges) <= 0).any():
            raise ValueError(f"edges must be finite and increasing in one dimension; they had shape {edges.shape}")
        if counts.shape != (len(edges) + 1,) or (counts < 0).any() or not counts.any():
            raise ValueError(
                f"counts must be {len(edges) + 1} non-negative numbers, one more than edges, and not all zero; "
                f"their shape was {counts.shape}"
            )
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def from_scores(cls, scores: ArrayLike, *, bins: int = 256, seed: int = 0) -> ScoreReference:
        """Make a reference from the scores of held-out in-distribution images.

        The bin edges are quantiles of a random half, and the other half is counted: with edges from the counted
        scores, the p-values would not be uniform.

        Args:
            scores: ``(n,)``, finite, at least 20, none of an image that trained the detector.
            bins: Largest number of bins; there are fewer if scores are few.
            seed: Seed of the split.

        Raises:
            ValueError: There are fewer than 20 scores, or some are not finite.
        """
        values = _finite("scores", scores)
        if len(values) < 20:
            raise ValueError(f"scores must hold at least 20 in-distribution scores; there were {len(values)}")
        checks.at_least(2, bins=bins)
        checks.is_seed(seed)
        shuffled = np.random.default_rng(seed).permutation(values)
        half = len(values) // 2
        levels = np.linspace(0, 1, min(bins, half) + 1)[1:-1]
        edges = np.unique(np.quantile(shuffled[:half], levels))
        places = np.searchsorted(edges, shuffled[half:], side="right")
        return cls(edges, np.bincount(places, minlength=len(edges) + 1).astype(np.float64))


class DriftMonitor:
    """A sequential test on a stream of uncertainty scores.

    Args:
        reference: A `ScoreReference`, or the held-out in-distribution scores themselves.
        false_alarm_rate: In (0, 1). For ``form="ever"``, the bound on the probability of ever raising a false alarm;
            for ``form="average"``, one over the least average number of images before one.
        form: ``"ever"`` or ``"average"``, see the description of the module.
        wrong_above: The risk above which answers count as wrong (`fastgrad.deploy.error_rate`), or None.
        seed: Seed of the random numbers that break ties; monitors with one seed agree on the same stream.

    Attributes:
        count: Number of scores since the start or the last `reset`.
        evidence: The capital now: what a bet of 1 against "nothing has changed" has become; with ``form="average"``, a
            bet of 1 on each image.
        alarm_at: Number of the score (from 1) that raised the alarm, or None. An alarm stays until `reset`.

    Raises:
        ValueError: A rate is outside (0, 1), the form is unknown, or the reference is unusable.
    """

    def __init__(
        self,
        reference: ScoreReference | ArrayLike,
        *,
        false_alarm_rate: float = 0.01,
        form: Literal["ever", "average"] = "ever",
        wrong_above: float | None = None,
        seed: int = 0,
    ) -> None:
        checks.lies_in("(0, 1)", false_alarm_rate=false_alarm_rate)
        checks.one_of("form", form, ("ever", "average"))
        checks.is_seed(seed)
        if wrong_above is not None:
            check_limit(wrong_above)
        self.wrong_above = wrong_above
        self.reference = reference if isinstance(reference, ScoreReference) else ScoreReference.from_scores(reference)
        self.false_alarm_rate = float(false_alarm_rate)
        self.form = form
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget the stream and its alarm; keep the reference.

        Each start has its own error rate: after k resets, the probability that there was any false alarm is at most
        ``(k + 1) * false_alarm_rate``.
        """
        self._random = np.random.default_rng(self._seed)
        self._counts = self.reference.counts.copy()
        self._total = float(self._counts.sum())
        self._capital = np.zeros(len(_BETS))
        self._peak = 0.0
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=1000)
        self.count = 0
        self.evidence = 0.0 if self.form == "average" else 1.0
        self.alarm_at: int | None = None

    @property
    def error_rate(self) -> ErrorRate | None:
        """The estimated share of wrong answers among the last 1,000 inputs with a risk; None without an estimate."""
        if self.wrong_above is None or len(self._recent) < FEWEST:
            return None
        risk, uncertainty = np.array(self._recent).T
        clean = max(int(self.reference.counts.sum()), 1)
        return error_rate(risk, uncertainty, self.wrong_above, clean)

    @property
    def alarm(self) -> bool:
        """Whether an alarm has been raised since the last `reset`."""
        return self.alarm_at is not None

    @property
    def p_value(self) -> float:
        """Bound on the probability that the evidence was ever this high if nothing has changed.

        Valid at any time; with ``form="average"``, whose mean evidence grows by 1 per image, at a time fixed before.
        """
        expected = float(max(self.count, 1)) if self.form == "average" else 1.0
        return expected / max(self._peak, expected)

    def update(self, scores: ArrayLike, risk: ArrayLike | None = None) -> bool:
        """Read one score, or scores ``(n,)`` in their order of arrival; return `alarm`.

        ``risk`` holds the risks of the same inputs, for `error_rate`; the scores must then be uncertainties.

        Raises:
            ValueError: A score or risk is not finite, or their shapes differ; none of them was read.
        """
        values = _finite("scores", scores)
        if risk is not None:
            risks = _finite("risk", risk)
            checks.shape_is("risk", risks, values.shape, "one per score")
            self._recent.extend(zip(risks.tolist(), values.tolist(), strict=True))
        bins = np.searchsorted(self.reference.edges, values, side="right")
        for bin_, tie in zip(bins.tolist(), self._random.random(len(bins)).tolist(), strict=True):
            # The new score is ranked among all scores, including itself, which makes p exactly uniform.
            self._counts[bin_] += 1
            self._total += 1
            above = float(self._counts[bin_ + 1 :].sum())
            p = (above + tie * float(self._counts[bin_])) / self._total
            log_p, log_1p = math.log(max(p, 1e-300)), math.log(max(1.0 - p, 1e-17))
            factors = np.exp(_LOG_NORMALIZER + (_BETS[:, 0] - 1) * log_p + (_BETS[:, 1] - 1) * log_1p)

            self.count += 1
            # Ever: shares 1/(t (t + 1)) sum to 1; the later ones, 1/(t + 1) in all, are idle. Average: 1 at each step.
            share, idle = 1.0, 0.0
            if self.form == "ever":
                share, idle = 1.0 / (self.count * (self.count + 1)), 1.0 / (self.count + 1)
            self._capital = np.minimum((self._capital + share * _PRIOR) * factors, _LARGEST)
            self.evidence = float(self._capital.sum()) + idle
            self._peak = max(self._peak, self.evidence)
            if self.alarm_at is None and self.evidence >= 1.0 / self.false_alarm_rate:
                self.alarm_at = self.count
        return self.alarm

    def state(self) -> dict[str, Any]:
        """Return what a dashboard shows: attributes, rate, form, `error_rate` and `summary`."""
        shown = ("count", "evidence", "p_value", "alarm", "alarm_at", "false_alarm_rate", "form")
        rate = self.error_rate
        estimate = None if rate is None else rate._asdict()
        return {name: getattr(self, name) for name in shown} | {"error_rate": estimate, "summary": self.summary()}

    def summary(self) -> str:
        """Return a sentence that says whether there is an alarm, on how many inputs, and at which error rate."""
        verdict = f"Drift was shown at input {self.alarm_at} of" if self.alarm else "No drift was shown in"
        if self.form == "average":
            rate = f"without drift a false alarm comes once in {1 / self.false_alarm_rate:g} inputs or later on average"
        else:
            rate = f"the probability of ever raising this alarm without drift is at most {self.false_alarm_rate:g}"
        compared = f"compared with {self.reference.counts.sum():g} clean ones"
        return f"{verdict} {self.count} inputs, {compared}; {rate}."


def _finite(name: str, given: ArrayLike) -> Array:
    values = np.atleast_1d(checks.to_array(name, given))
    if values.ndim != 1:
        raise ValueError(f"{name} must be one number or one-dimensional; the shape was {values.shape}")
    return values
