"""What `TwoStageModel.fit` did, and what each block adds to the detection of challenges of kinds left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastgrad.blocks.block import CHALLENGE_CLASSIFIER
from fastgrad.challenges import CHALLENGES
from fastgrad.detector.calibrate import Table, assign_folds, fit_scores, values_of, with_p_values
from fastgrad.detector.challenge_classifier import ChallengeClassifier
from fastgrad.detector.constants import CAP, WEIGHT
from fastgrad.detector.price import PriceReport
from fastgrad.metrics.interval import Interval
from fastgrad.scores.conformal import PValues, weighted


class Gain(NamedTuple):
    """AUROC gain from adding a block to all others, and half the width of its 95 % interval over inputs."""

    auroc: float
    interval: float


@dataclass(frozen=True)
class Report:
    """Summary of a fit; prints as text.

    Attributes:
        price: The blocks, what was dropped and why, and the price. If blocks were named, nothing was measured.
        drawn: Clean inputs that were used.
        seen: Clean inputs that the loader gave.
        challenges: How many challenges of each kind.
        passes: Predicted cost of making challenges and reading everything, in forward passes over the clean inputs.
        calibrating: Clean inputs behind the false-alarm rates; ``1 / (calibrating + 1)`` is the smallest they promise.
        exact: Whether nothing was fitted on these inputs.
        risk: What the risk was learned from, or why there is none.
        correction: Accuracy of the network and of the corrected answers, by fits without each input; None if no
            correction was asked for.
        gains: What each block adds, by name; None until it is asked for.
        normalisation: Mean and standard deviation by channel that normalised unit images, from ``clip``, ``mean`` and
            ``std`` of `fit`; None if the range was read from the images, or if inputs are not images.
    """

    price: PriceReport
    drawn: int
    seen: int
    challenges: dict[str, int]
    passes: float
    calibrating: int
    exact: bool
    risk: str
    correction: str | None = None
    gains: dict[str, Gain] | None = None
    normalisation: list[list[float]] | None = None

    @property
    def kept(self) -> list[str]:
        """Names of the blocks that the detector reads."""
        return list(self.price.blocks)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """Return the report that `dataclasses.asdict` stored."""
        price = dict(stored["price"])
        price["blocks"], price["dropped"] = tuple(price["blocks"]), tuple(map(tuple, price["dropped"]))
        gains = None if stored["gains"] is None else {name: Gain(*gain) for name, gain in stored["gains"].items()}
        return cls(**{**stored, "price": PriceReport(**price), "gains": gains})

    def __str__(self) -> str:
        made = sum(self.challenges.values())
        measured = (
            "not measured, as the blocks were named"
            if math.isnan(self.price.measured)
            else f"{self.price.measured:.2f} +- {self.price.error:.2f} measured on batches of {self.price.batch}, "
            f"limit {self.price.limit:g}"
        )
        if self.price.single > self.price.limit:
            measured += f"; {self.price.single:.2f} on single inputs, above it: answer batches, or export a file"
        form = "held out, so rates are exact" if self.exact else "each scored by what was fitted without it"
        lines = [
            f"blocks        {', '.join(self.kept)}",
            *(f"  without {name}: {why}" for name, why in self.price.dropped),
            f"price         {self.price.predicted:.2f} forward passes predicted, {measured}",
            f"clean inputs  {self.drawn} of {self.seen}",
            f"challenges    {made} of {len(self.challenges)} kinds; about {self.passes:.0f} forward passes in all",
            f"false alarms  from {1 / (self.calibrating + 1):.2g} on: {self.calibrating} clean inputs, {form}",
            f"risk          {self.risk}",
        ]
        lines += [] if self.correction is None else [f"correction    {self.correction}"]
        if self.gains is not None:
            lines.append("gain in AUROC on kinds of challenge left out of training")
            lines += [f"  {name:20} {gain.auroc:+.3f} +- {gain.interval:.3f}" for name, gain in self.gains.items()]
        return "\n".join(lines)


def gains(table: Table, kinds: NDArray[np.str_]) -> dict[str, Gain]:
    """Return by block the AUROC of all blocks minus that without it, on families that the classifier did not learn.

    Half of the sources are fitted on and the other half tests; then the halves swap.

    ``kinds`` ``(n,)`` names the kinds of the table; empty for clean samples. ValueError if there are fewer than two
    blocks, or fewer than two families of challenge, so that none can be left out.
    """
    family = np.array([CHALLENGES[kind].family if kind in CHALLENGES else kind for kind in kinds])
    families = sorted(set(family) - {""})
    if len(families) < 2 or len(table.blocks) < 2:
        raise ValueError(
            "gains need at least two blocks and two families of challenge; there were "
            f"{list(table.blocks)}, {list(map(str, families))}"
        )
    sets = {"": list(table.blocks), **{name: [b for b in table.blocks if b != name] for name in table.blocks}}
    fold = assign_folds(table, 2, np.random.RandomState(0))
    placed: dict[str, list[NDArray[np.float64]]] = {name: [] for name in sets}
    sources: list[NDArray[np.intp]] = []
    for number in (0, 1):
        inside, clean = (fold >= 0) & (fold != number), (fold == number) & (table.kinds == 0)
        scores = fit_scores(table, inside, int((inside & (table.kinds == 0)).sum()))
        raw, _ = values_of(scores.values(), table.blocks)
        module = with_p_values(scores, raw, clean)
        evidence = dict(zip(module.sources, module.by_source(module.evidence(raw)).T, strict=True))
        joint = scores[CHALLENGE_CLASSIFIER].rows.get_submodule("parts")
        parts = {name: rows(table.blocks) for name, rows in joint.named_children()}
        for left_out in families:
            learned, challenged = inside & (family != left_out), (fold == number) & (family == left_out)
            sources.append(table.groups[challenged])
            for name, chosen in sets.items():
                rows = torch.cat([parts[block] for block in chosen], 1)
                classifier = ChallengeClassifier.fit(
                    rows[torch.from_numpy(learned)], table.kinds[learned], table.classes
                )
                resemblance = -classifier(rows)[:, :1].T
                log_p = PValues.fit(resemblance[:, torch.from_numpy(clean)], [False])(resemblance)
                total = sum(evidence[block] for block in chosen if block in evidence)
                total = (total + weighted(log_p, CAP, [WEIGHT])[0]).numpy()
                placed[name].append(placements(total[clean], total[challenged]))
    _, source = np.unique(np.concatenate(sources), return_inverse=True)
    joined = {name: np.concatenate(values) for name, values in placed.items()}
    result = {}
    for name in table.blocks:
        # Challenges of one source are not independent samples.
        result[name] = Gain(*Interval.of(joined[""] - joined[name], source))
    return result


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
