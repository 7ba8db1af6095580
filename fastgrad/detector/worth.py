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
from fastgrad.challenges import CHALLENGES
from fastgrad.detector.estimator import UncertaintyDetector
from fastgrad.detector.supervised import fit_perceptrons, train_networks
from fastgrad.scores.conformal import OneSided

Array = NDArray[np.float64]
#: Clean and challenging samples that a trial of H learns from, at most; more change its price, not its verdict.
_LEARNED = 1000
#: Passes of a trial over them and its hidden units: sets of blocks rank alike with fewer than a final H has.
_EPOCHS, _HIDDEN = 15, 64
#: Weight of an H beside a one-class score's 1 while blocks are chosen. It is not chosen itself: an H without whole
#: families of kinds is weaker than the final one.
_WEIGHT = 2.0
#: Weight of the final H, of generated challenges and of the user's own. With single kinds left out of an H of full
#: size, 3 and 4 were best on photographs; of few kinds less is known.
GENERATED, OWN = 4.0, 2.0
#: Half the width of a 95 % interval, in standard errors.
_INTERVAL = 1.96
#: Blocks that have been worth their small price on networks of many kinds: where a choice begins.
USUAL = ("logits", "features", "activations", "image")
#: What joins them where a forward pass more may be spent: worth something on some networks, nothing on others, and, in
#: an exported file, not so cheap that a budget with little room should begin with it.
BESIDE = ("roughness",)
#: What is small, in forward passes, and what is too little of an AUROC to be paid for at all.
_SMALL, _LITTLE = 0.2, 1e-3


class State(NamedTuple):
    """Blocks that are kept, and those of them that H reads."""

    kept: frozenset[str]
    seen: frozenset[str]

    def plus(self, name: str) -> State:
        """With one block more, which H reads."""
        return State(self.kept | {name}, self.seen | {name})

    def minus(self, name: str) -> State:
        """With one block less."""
        return State(self.kept - {name}, self.seen - {name})


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
        worth: Of every candidate, and half the width of its 95 % interval over samples.
        auroc: Mean over kinds left out of training.
    """

    kept: list[str]
    seen: list[str]
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
        self._found: dict[State, dict[str, Placements]] = {}
        self._trials: dict[frozenset[str], list[Tensor]] = {}
        self._evidence: dict[str, list[Array]] = {}
        self._rows: dict[str, Array] = {}

    def _folds(
        self, challenging: NDArray[np.bool_], held_out: NDArray[np.bool_], own: bool, rng: np.random.Generator
    ) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Challenging samples to learn from and to judge on, for each fold."""
        families = np.array([CHALLENGES[k].family if k in CHALLENGES else k for k in self.kinds])
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
        """The blocks to keep, those that H reads among them, and what each block is worth.

        A choice begins with `USUAL`, and from a pass more on `BESIDE`, where they can be had and their price is small.
        As long as a change makes the detector better by more than chance would, the best is made: a block more, which
        the budget must allow, a block less, or one less under H, which then serves by its own scores alone. What the
        user is ready to pay for is taken where it helps by more than its standard error, and by a thousandth; what is
        there goes only where that helps by more than its interval. Few samples give wide ones, and change little.

        Args:
            names: Candidates.
            price: Of each, beyond the forward pass.
            allowance: For all together.
        """
        state = State(frozenset({"logits"}), frozenset({"logits"}))
        for name in (*USUAL, *(BESIDE if allowance >= 1 else ())):
            if name in names and price[name] <= _SMALL and self._fits(state.plus(name), price, allowance):
                state = state.plus(name)
        while True:
            changes = [state.plus(name) for name in names if name not in state.kept]
            for name in sorted(state.kept - {"logits"}):
                changes += [state.minus(name), State(state.kept, state.seen - {name})]
            better = {}
            for other in changes:
                if other != state and self._fits(other, price, allowance):
                    gain, interval = self._gain(other, state)
                    more = other.kept > state.kept
                    if gain > (max(_LITTLE, interval / _INTERVAL) if more else interval):
                        better[other] = gain
            if not better:
                break
            state = max(better, key=lambda other: better[other])
        worth = {}
        for name in names:
            if name != "logits":
                # Kept blocks that H does not read are worth what their own scores are.
                inside = state if name in state.kept else state.plus(name)
                worth[name] = self._gain(inside, state.minus(name))
        return Choice(
            [name for name in names if name in state.kept],
            [name for name in names if name in state.seen],
            worth,
            self.mean(state),
        )

    @staticmethod
    def _fits(state: State, price: Mapping[str, float], allowance: float) -> bool:
        return sum(price[name] for name in state.kept if name != "logits") <= allowance

    def mean(self, state: State) -> float:
        """Mean AUROC over kinds."""
        return float(np.mean([kind.own.mean() for kind in self._quality(state).values()]))

    def _gain(self, state: State, other: State) -> tuple[float, float]:
        """What a state is better than another by, and half the width of the interval over samples."""
        full, without = self._quality(state), self._quality(other)
        clean = np.mean([full[kind].clean - without[kind].clean for kind in full], 0)
        own = [full[kind].own - without[kind].own for kind in full]
        variance = _variance(clean) + sum(map(_variance, own)) / len(own) ** 2
        return float(clean.mean()), _INTERVAL * math.sqrt(variance)

    def _quality(self, state: State) -> dict[str, Placements]:
        """How clean and challenging samples lie to each other, by kind."""
        if state not in self._found:
            one_class = sum(
                (column for name in sorted(state.kept) for column in self._of(name)),
                np.zeros(len(self.kinds)),
            )
            found: dict[str, Placements] = {}
            for surprise, (_, judged) in zip(self._surprises(state.seen), self.folds, strict=True):
                total = one_class + _WEIGHT * surprise
                clean = total[self.calibrating]
                for kind in sorted(set(self.kinds[judged])):
                    own = judged[self.kinds[judged] == kind]
                    # Parts of one kind, left out in turn, count as kinds of their own.
                    label = f"{kind} {len(found)}" if kind in found else kind
                    found[label] = Placements.of(clean, total[own])
            self._found[state] = found
        return self._found[state]

    def _surprises(self, seen: frozenset[str]) -> list[Array]:
        """For each fold, minus the logarithm of the p-value of an H on the blocks ``seen``, for every sample."""
        trials = [[self.detector.members * value for value in self._trial(seen)]]
        if self.detector.supervised == "network" and len(seen) > 1:
            trials += [self._trial(frozenset({name})) for name in sorted(seen)]
        totals = [torch.stack(own).sum(0) for own in zip(*trials, strict=True)]
        return [self._capped(-OneSided.fit(value[self.calibrating])(value)) for value in totals]

    def _trial(self, seen: frozenset[str]) -> list[Tensor]:
        """For each fold, what one network, or linear map, on the blocks ``seen`` says of every sample."""
        if seen not in self._trials:
            rows = np.concatenate([self._joint(name) for name in sorted(seen)], 1)
            sees = torch.ones(1, rows.shape[1])
            tasks = []
            for learned, _ in self.folds:
                picked = np.concatenate([self.fitting, learned])
                tasks.append((picked, np.unique(self.kinds[picked], return_inverse=True)[1]))
            if self.detector.supervised == "network":
                hidden = min(_HIDDEN, self.detector.hidden)
                hs = train_networks(rows, tasks, hidden=hidden, sees=sees, seed=0, epochs=_EPOCHS)
            else:
                hs = [fit_perceptrons(rows[p], codes, hidden=None, sees=sees, seed=0) for p, codes in tasks]
            self._trials[seen] = [h(torch.from_numpy(rows)) for h in hs]
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
