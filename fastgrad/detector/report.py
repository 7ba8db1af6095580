"""What `TwoStageModel.fit` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.metrics.interval import Interval


@dataclass(frozen=True)
class Report:
    """Summary of a fit; prints as text.

    Attributes:
        prices: The predicted price of each block in forward passes, counted and not timed, in addition to the one that
            gives the logits; `TwoStageModel.price` measures an answer.
        left_out: Names of the default blocks that the network or its inputs cannot serve, each with the reason.
        drawn: Clean inputs that were used.
        seen: Clean inputs that the loader gave.
        challenges: How many challenges of each kind.
        passes: Predicted cost of making challenges and reading everything, in forward passes over the clean inputs;
            None if features were given.
        calibrating: Clean inputs behind the false-alarm rates; ``1 / (calibrating + 1)`` is the smallest they promise.
        exact: Whether nothing was fitted on these inputs.
        risk: What the risk was learned from, or why there is none.
        correction: Accuracy of the network and of the corrected answers, by fits without each input; None if no
            correction was asked for.
        levels: Shares of clean images that are flagged at the detector's false-alarm rate: unchanged, one grey level
            brighter or darker, and with noise of one level; None if inputs are not images.
        normalisation: Mean and standard deviation by channel that normalised unit images, from ``clip``, ``mean`` and
            ``std`` of `fit`; None if the range was read from the images, or if inputs are not images.
    """

    prices: dict[str, float]
    left_out: dict[str, str]
    drawn: int
    seen: int
    challenges: dict[str, int]
    passes: float | None
    calibrating: int
    exact: bool
    risk: str
    correction: str | None = None
    levels: dict[str, float] | None = None
    normalisation: list[list[float]] | None = None

    @property
    def kept(self) -> list[str]:
        """Names of the blocks that the detector reads."""
        return list(self.prices)

    @property
    def predicted(self) -> float:
        """Predicted price of an answer in forward passes, including the one that gives the logits."""
        return 1 + sum(self.prices.values())

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """Return the report that `dataclasses.asdict` stored."""
        return cls(**stored)

    def __str__(self) -> str:
        made = sum(self.challenges.values())
        form = "held out, so rates are exact" if self.exact else "each scored by what was fitted without it"
        cost = "" if self.passes is None else f"; about {self.passes:.0f} forward passes in all"
        passes = f"{self.predicted:g} forward pass" + "es" * (self.predicted != 1)
        beyond = "".join(f", {price:g} of them for {name}" for name, price in self.prices.items() if price)
        lines = [
            f"blocks        {', '.join(self.kept)}",
            *(f"  without {name}: {why}" for name, why in self.left_out.items()),
            f"price         {passes} predicted{beyond}; price(x) measures it",
            f"clean inputs  {self.drawn} of {self.seen}",
            f"challenges    {made} of {len(self.challenges)} kinds{cost}",
            f"false alarms  from {1 / (self.calibrating + 1):.2g} on: {self.calibrating} clean inputs, {form}",
            f"risk          {self.risk}",
        ]
        if self.levels is not None:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in self.levels.items())
            lines.append(f"grey levels   flagged: {shares}")
        lines += [] if self.correction is None else [f"correction    {self.correction}"]
        return "\n".join(lines)


def placements(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of ``low`` below each of ``high``, ties counted half; their mean is the AUROC."""
    ordered = np.sort(low)
    below, upto = (np.searchsorted(ordered, high, side) for side in ("left", "right"))
    return (below + upto) / (2 * len(ordered))


def probability_suffices(risk: NDArray[np.float64], doubt: NDArray[np.float64], wrong: NDArray[np.bool_]) -> str:
    """Return words if ``doubt`` ranks ``wrong`` answers as well as ``risk``, within its interval; all ``(n,)``."""
    if wrong.all() or not wrong.any():
        return ""
    own, other = (placements(score[~wrong], score[wrong]) for score in (risk, doubt))
    gain = Interval.of(own - other, np.arange(len(own)))
    if gain.mean > gain.half:
        return ""
    return (
        "; the answer's probability alone ranks wrong answers to clean inputs as well: AUROC "
        f"{other.mean():.3f}, by the risk {gain.mean:+.3f} +- {gain.half:.3f}"
    )
