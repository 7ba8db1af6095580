"""What a block is worth: the AUROC that a detector loses without it, on kinds of challenge it was not trained on.

A classifier H that has seen a kind of challenge finds it again by heart, and every further input helps it to. What
counts is what it finds of the others. So kinds are left out of training in turn, and judged on challenges made from
clean samples that neither the scores nor H have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.blocks import BLOCKS
from fastgrad.blocks.block import Settings
from fastgrad.estimators.detector import UncertaintyDetector
from fastgrad.estimators.supervised import fit_perceptrons, train_networks
from fastgrad.metrics import auroc
from fastgrad.scores.conformal import OneSided

Array = NDArray[np.float64]
#: Clean and challenging samples that a trial of H learns from, at most; more change its price, not its verdict.
_LEARNED = 2000
#: Groups of kinds left out in turn.
_FOLDS = 5
#: A block that costs more than this must be worth more than its interval.
_FREE = 0.05


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
        self._found: dict[frozenset[str], dict[str, float]] = {}
        self._evidence: dict[str, list[Array]] = {}
        self._rows: dict[str, Array] = {}

    def _folds(
        self, challenging: NDArray[np.bool_], held_out: NDArray[np.bool_], own: bool, rng: np.random.Generator
    ) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Challenging samples to learn from and to judge on, for each fold."""
        kinds = sorted(set(self.kinds[challenging]))
        count = min(_FOLDS, len(kinds))
        if own or count < 2 or not (challenging & held_out).any():
            part = rng.integers(0, 2, len(self.kinds))
            return [
                (
                    _some(challenging & (part == side), _LEARNED, rng),
                    np.flatnonzero(challenging & (part != side)),
                )
                for side in (0, 1)
            ]
        group = {kind: index % count for index, kind in enumerate(kinds)}
        fold = np.array([group.get(kind, -1) for kind in self.kinds])
        return [
            (
                _some(challenging & ~held_out & (fold != index), _LEARNED, rng),
                np.flatnonzero(challenging & held_out & (fold == index)),
            )
            for index in range(count)
        ]

    def choose(
        self, names: Sequence[str], price: Mapping[str, float], allowance: float
    ) -> tuple[list[str], dict[str, tuple[float, float]]]:
        """The blocks to keep, and the worth of every one with half the width of its 95 % interval.

        What costs next to nothing is all taken up, and dropped again, the least useful first, as long as the rest is
        better without it. Then what costs more is added, the most useful first, while it is worth more than its
        interval and the budget lasts.

        Args:
            names: Candidates.
            price: Of each, beyond the forward pass.
            allowance: For all together.
        """
        kept = [name for name in names if price[name] <= min(_FREE, allowance) or name == "logits"]
        while len(kept) > 1:
            losses = {name: self._gain(kept, name)[0] for name in kept if name != "logits"}
            least = min(losses, key=lambda name: losses[name])
            if losses[least] > 0:
                break
            kept.remove(least)
        while True:
            left = allowance - sum(price[name] for name in kept)
            more = {
                name: self._gain([*kept, name], name)
                for name in names
                if name not in kept and _FREE < price[name] <= left
            }
            useful = {name: gain for name, (gain, interval) in more.items() if gain > interval}
            if not useful:
                break
            kept.append(max(useful, key=lambda name: useful[name]))
        kept = [name for name in names if name in kept]
        worth = {
            name: self._gain(kept if name in kept else [*kept, name], name)
            for name in names
            if name != "logits"
        }
        return kept, worth

    def mean(self, names: Sequence[str]) -> float:
        """Mean AUROC over kinds."""
        return float(np.mean(list(self.quality(names).values())))

    def _gain(self, names: Sequence[str], name: str) -> tuple[float, float]:
        """What ``name`` adds to the other names, and half the width of the interval over kinds."""
        others = [other for other in names if other != name]
        if not others:
            return math.inf, 0.0
        full, without = self.quality(names), self.quality(others)
        differences = np.array([full[kind] - without[kind] for kind in full])
        spread = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return float(differences.mean()), 1.96 * float(spread)

    def quality(self, names: Sequence[str]) -> dict[str, float]:
        """AUROC of clean against challenging samples, by kind."""
        key = frozenset(names)
        if key not in self._found:
            self._found[key] = self._quality(sorted(key))
        return self._found[key]

    def _quality(self, names: Sequence[str]) -> dict[str, float]:
        one_class = sum((column for name in names for column in self._of(name)), np.zeros(len(self.kinds)))
        rows = np.concatenate([self._joint(name) for name in names], 1)
        tasks = []
        for learned, _ in self.folds:
            picked = np.concatenate([self.fitting, learned])
            tasks.append((picked, np.unique(self.kinds[picked], return_inverse=True)[1]))
        if self.detector.supervised == "network":
            hs = train_networks(rows, tasks, hidden=self.detector.hidden, members=1, seed=0)
        else:
            hs = [
                fit_perceptrons(rows[picked], codes, hidden=None, members=1, seed=0)
                for picked, codes in tasks
            ]
        found: dict[str, float] = {}
        for h, (_, codes), (_, judged) in zip(hs, tasks, self.folds, strict=True):
            weight, _ = self.detector._trust(codes)
            total = one_class + weight * self._surprise(h(torch.from_numpy(rows)).numpy())
            clean = total[self.calibrating]
            for kind in sorted(set(self.kinds[judged])):
                own = judged[self.kinds[judged] == kind]
                # Parts of one kind, left out in turn, count as kinds of their own.
                label = f"{kind} {len(found)}" if kind in found else kind
                found[label] = auroc(clean, total[own])
        return found

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

    def _surprise(self, values: Array) -> Array:
        """Minus the logarithm of H's p-value, for every sample."""
        scores = torch.from_numpy(values)
        return self._capped(-OneSided.fit(scores[self.calibrating])(scores))

    def _capped(self, evidence: Tensor) -> Array:
        result: Array = evidence.clamp(max=float(self.detector.cap)).numpy()
        return result


def _some(mask: NDArray[np.bool_], most: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Places where ``mask`` is true, a random choice where there are more than ``most``."""
    places = np.flatnonzero(mask)
    return places if len(places) <= most else np.sort(rng.choice(places, most, replace=False))
