"""What a block is worth: the AUROC that a detector loses without it, on kinds of challenge it was not trained on.

A classifier H that has seen a kind of challenge finds it again by heart, and every further input helps it to. What
counts is what it finds of the others. So kinds are left out of training in turn, with all that resemble them, and
judged on challenges made from clean samples that neither the scores nor H have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.blocks import BLOCKS
from fastgrad.blocks.block import Settings
from fastgrad.challenges import FAMILIES
from fastgrad.estimators.detector import UncertaintyDetector
from fastgrad.estimators.supervised import fit_perceptrons, train_networks
from fastgrad.scores.conformal import OneSided

Array = NDArray[np.float64]
#: Clean and challenging samples that a trial of H learns from, at most; more change its price, not its verdict.
_LEARNED = 1000
#: Passes of a trial over them and its hidden units: sets of blocks rank alike with fewer than a final H has.
_EPOCHS, _HIDDEN = 15, 64
#: Differences of AUROC below this are noise: nothing is dropped for them.
_NOISE = 0.002
#: Weights of H beside a one-class score's 1 that are tried.
WEIGHTS = (1.0, 2.0, 3.0)
#: A block that costs more than this must be worth more than its interval.
_FREE = 0.05


class State(NamedTuple):
    """Blocks that are kept, and those of them that H reads."""

    kept: frozenset[str]
    seen: frozenset[str]


class Placements(NamedTuple):
    """For one kind, the share of its samples that score above each clean one, and of clean ones below each of its own.

    Either's mean is the AUROC; their variances are the AUROC's, and those of differences the difference's (DeLong et
    al., "Comparing the areas under two or more correlated receiver operating characteristic curves", 1988).
    """

    clean: Array
    own: Array

    @classmethod
    def of(cls, clean: Array, own: Array) -> Placements:
        """From the scores ``(m,)`` of clean samples and ``(n,)`` of those of the kind."""
        return cls(1 - _below(own, clean), _below(clean, own))


def _below(reference: Array, values: Array) -> Array:
    """The share of ``reference`` below each value, equal ones counting half."""
    ordered = np.sort(reference)
    sides = [np.searchsorted(ordered, values, side) for side in ("left", "right")]
    share: Array = np.add(*sides) / (2 * len(ordered))
    return share


@dataclass(frozen=True)
class Choice:
    """What `Judge.choose` found.

    Attributes:
        kept: Blocks that the detector reads.
        seen: Those of them that H reads.
        weight: How much H counts beside a one-class score.
        worth: Of every candidate, and half the width of its 95 % interval over samples.
        auroc: Mean over kinds left out of training.
    """

    kept: list[str]
    seen: list[str]
    weight: float
    worth: dict[str, tuple[float, float]]
    auroc: float


class Judge:
    """Fits every candidate's scores once, and H for every set of blocks and every group of kinds left out.

    Args:
        detector: Its parameters say how scores are fitted and joined.
        X: Candidate blocks of all samples.
        kinds: ``(n,)``, empty for clean samples.
        held_out: ``(n,)``: clean samples that calibrate, challenging ones that judge.
        own: Whether the challenging samples are the user's: then parts of each kind are left out instead of kinds.
    """

    def __init__(
        self,
        detector: UncertaintyDetector,
        X: Mapping[str, Tensor],
        kinds: NDArray[np.str_],
        held_out: NDArray[np.bool_],
        *,
        own: bool,
    ) -> None:
        self.detector, self.kinds = detector, kinds
        rng = np.random.default_rng(0)
        clean = kinds == ""
        self.settings = Settings(
            log=detector.log,
            components=detector.components,
            dimensions=detector.dimensions,
            neighbours=detector.neighbours,
            seed=0,
        )
        self.fitting = _some(clean & ~held_out, _LEARNED, rng)
        self.calibrating = _some(clean & held_out, _LEARNED, rng)
        self.folds = self._folds(~clean, held_out, own, rng)
        self.arrays = {name: value.double().numpy() for name, value in X.items()}
        self._found: dict[tuple[State, float], dict[str, Placements]] = {}
        self._trials: dict[frozenset[str], list[Array]] = {}
        self._evidence: dict[str, list[Array]] = {}
        self._rows: dict[str, Array] = {}

    def _folds(
        self, challenging: NDArray[np.bool_], held_out: NDArray[np.bool_], own: bool, rng: np.random.Generator
    ) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Challenging samples to learn from and to judge on, for each fold."""
        families = np.array([FAMILIES.get(kind, kind) for kind in self.kinds])
        names = sorted(set(families[challenging]))
        if own or len(names) < 2 or not (challenging & held_out).any():
            part = rng.integers(0, 2, len(self.kinds))
            return [
                (
                    _some(challenging & (part == side), _LEARNED, rng),
                    np.flatnonzero(challenging & (part != side)),
                )
                for side in (0, 1)
            ]
        return [
            (
                _some(challenging & ~held_out & (families != name), _LEARNED, rng),
                np.flatnonzero(challenging & held_out & (families == name)),
            )
            for name in names
        ]

    def choose(self, names: Sequence[str], price: Mapping[str, float], allowance: float) -> Choice:
        """The blocks to keep, those that H reads among them, H's weight, and what each block is worth.

        What costs next to nothing is all taken up, and dropped again, the least useful first, as long as the rest is
        better without it. Then what costs more is added, the most useful first, while it is worth more than its
        interval and the budget lasts. A block may serve by its one-class scores alone, where H is better off without.

        Args:
            names: Candidates.
            price: Of each, beyond the forward pass.
            allowance: For all together.
        """
        kept = frozenset(name for name in names if price[name] <= min(_FREE, allowance) or name == "logits")
        state = State(kept, kept)
        while True:
            options = [
                option
                for name in sorted(state.kept - {"logits"})
                for option in (
                    State(state.kept - {name}, state.seen - {name}),
                    State(state.kept, state.seen - {name}),
                )
                if option != state
            ]
            best = max(options, key=self.mean, default=state)
            if self.mean(best) <= self.mean(state) + _NOISE:
                break
            state = best
        while True:
            left = allowance - sum(price[name] for name in state.kept)
            more = [
                State(state.kept | {name}, state.seen | seen)
                for name in names
                if name not in state.kept and _FREE < price[name] <= left
                for seen in (frozenset(), frozenset({name}))
            ]
            useful = {
                option: gain
                for option in more
                for gain, interval in [self._gain(option, state)]
                if gain > interval
            }
            if not useful:
                break
            state = max(useful, key=lambda option: useful[option])
        worth = {}
        for name in names:
            if name == "logits":
                continue
            without = State(state.kept - {name}, state.seen - {name})
            if name in state.kept:
                worth[name] = self._gain(state, without)
            else:
                added = [
                    State(state.kept | {name}, state.seen | seen) for seen in (frozenset(), frozenset({name}))
                ]
                worth[name] = self._gain(max(added, key=self.mean), state)
        return Choice(
            [name for name in names if name in state.kept],
            [name for name in names if name in state.seen],
            self._weight(state),
            worth,
            self.mean(state),
        )

    def mean(self, state: State) -> float:
        """Mean AUROC over kinds, with the better of H's weights."""
        return self._mean(state, self._weight(state))

    def _mean(self, state: State, weight: float) -> float:
        return float(np.mean([kind.own.mean() for kind in self._quality(state, weight).values()]))

    def _weight(self, state: State) -> float:
        return max(WEIGHTS, key=lambda weight: self._mean(state, weight))

    def _gain(self, state: State, other: State) -> tuple[float, float]:
        """What a state is better than another by, and half the width of the interval over samples."""
        full = self._quality(state, self._weight(state))
        without = self._quality(other, self._weight(other))
        clean = np.mean([full[kind].clean - without[kind].clean for kind in full], 0)
        own = [full[kind].own - without[kind].own for kind in full]
        variance = _variance(clean) + sum(map(_variance, own)) / len(own) ** 2
        return float(clean.mean()), 1.96 * math.sqrt(variance)

    def _quality(self, state: State, weight: float) -> dict[str, Placements]:
        """How clean and challenging samples lie to each other, by kind."""
        key = (state, weight)
        if key not in self._found:
            one_class = sum(
                (column for name in sorted(state.kept) for column in self._of(name)),
                np.zeros(len(self.kinds)),
            )
            found: dict[str, Placements] = {}
            for surprise, (_, judged) in zip(self._surprises(state.seen), self.folds, strict=True):
                total = one_class + weight * surprise
                clean = total[self.calibrating]
                for kind in sorted(set(self.kinds[judged])):
                    own = judged[self.kinds[judged] == kind]
                    # Parts of one kind, left out in turn, count as kinds of their own.
                    label = f"{kind} {len(found)}" if kind in found else kind
                    found[label] = Placements.of(clean, total[own])
            self._found[key] = found
        return self._found[key]

    def _surprises(self, seen: frozenset[str]) -> list[Array]:
        """For each fold, minus the logarithm of the p-value of an H on the blocks ``seen``, for every sample."""
        if seen not in self._trials:
            rows = np.concatenate([self._joint(name) for name in sorted(seen)], 1)
            tasks = []
            for learned, _ in self.folds:
                picked = np.concatenate([self.fitting, learned])
                tasks.append((picked, np.unique(self.kinds[picked], return_inverse=True)[1]))
            if self.detector.supervised == "network":
                hidden = min(_HIDDEN, self.detector.hidden)
                hs = train_networks(rows, tasks, hidden=hidden, members=1, seed=0, epochs=_EPOCHS)
            else:
                hs = [fit_perceptrons(rows[p], codes, hidden=None, members=1, seed=0) for p, codes in tasks]
            values = [h(torch.from_numpy(rows)) for h in hs]
            self._trials[seen] = [
                self._capped(-OneSided.fit(value[self.calibrating])(value)) for value in values
            ]
        return self._trials[seen]

    def _of(self, name: str) -> list[Array]:
        """Minus the logarithm of the p-value of each one-class score of a block, for every sample."""
        if name not in self._evidence:
            chosen = {n: array[self.fitting] for n, array in self.arrays.items() if n in (name, "logits")}
            tensors = {
                n: torch.from_numpy(array) for n, array in self.arrays.items() if n in (name, "logits")
            }
            columns = []
            with torch.no_grad():
                for _, rows, score, meaning in BLOCKS[name].scores(chosen, self.settings):
                    values = score(rows(tensors))
                    columns.append(self._capped(-meaning.fit(values[self.calibrating])(values)))
            self._evidence[name] = columns
        return self._evidence[name]

    def _joint(self, name: str) -> Array:
        """What H sees of a block, for every sample."""
        if name not in self._rows:
            chosen = {n: array[self.fitting] for n, array in self.arrays.items() if n in (name, "logits")}
            tensors = {
                n: torch.from_numpy(array) for n, array in self.arrays.items() if n in (name, "logits")
            }
            with torch.no_grad():
                self._rows[name] = BLOCKS[name].joint(chosen, self.settings)(tensors).numpy()
        return self._rows[name]

    def _capped(self, evidence: Tensor) -> Array:
        result: Array = evidence.clamp(max=float(self.detector.cap)).numpy()
        return result


def _variance(values: Array) -> float:
    """Of the mean of independent ``values``."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _some(mask: NDArray[np.bool_], most: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Places where ``mask`` is true, a random choice where there are more than ``most``."""
    places = np.flatnonzero(mask)
    return places if len(places) <= most else np.sort(rng.choice(places, most, replace=False))
