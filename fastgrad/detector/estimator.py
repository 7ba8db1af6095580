"""`UncertaintyDetector`: how far a prediction can be trusted, from gradient features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastgrad import checks
from fastgrad.blocks.block import Settings
from fastgrad.detector.blocks import are_contrasts, check_blocks, check_squared, to_array
from fastgrad.detector.combined import DetectorModule, H, Part
from fastgrad.detector.inputs import (
    Split,
    as_tensors,
    challenging_of,
    check_rate,
    chunks,
    deal,
    kinds_of,
    take,
)
from fastgrad.detector.parts import joint_rows, one_class_scores
from fastgrad.detector.supervised import fit_perceptrons, views
from fastgrad.scores.conformal import COMBINATIONS, OneSided

Array = NDArray[np.float64]
Blocks = Mapping[str, ArrayLike]


class UncertaintyDetector(BaseEstimator):  # type: ignore[misc]
    """Scores how far each sample lies from clean data; higher is less reliable.

    Without labels, which is the usual case, one-class scores (Gaussian mixtures on the log norms and on image
    statistics; energy, margin and nearest neighbours where logits and features are given) become conformal
    p-values, two-sided where a score can be too good to be true, and are combined. With labels a classifier H
    joins them; the one-class scores stand guard beside it, so that a challenge unlike those it was trained on
    is not scored as safe.

    The score is ``-log(p)``, p being the probability that a clean sample looks at least so unusual,
    calibrated on clean data, each sample scored by what was fitted without it: above ``threshold(a)``, which is
    -log(a), lies a share a of clean data.

    Feature matrices are arrays or mappings of named blocks (see `fastgrad.detector.blocks`): a mapping says
    what is what; for a plain array the ``contrasts`` parameter does.

    Args:
        contrasts: For a plain array, whether axis 1 runs over contrast classes, to be ordered by logit rank
            (without logits, by the norm itself, which ranks alike). ``"auto"`` decides by the rule of
            `fastgrad.detector.blocks.are_contrasts`; the decision is in ``contrasts_``.
        log: True when X holds squared norms, False when it already holds their logarithms.
        supervised: H's shape: ``"network"`` (two layers) or ``"logistic"``.
        hidden: Width of the network's hidden layer.
        members: Networks that see all blocks, whose scores H averages with those of one more for each block alone.
        dropout: Chance that the network does not see an input of a sample in a step of its training.
        trust: How much H counts beside the one-class scores: ``"full"``, or ``"cautious"``, where only its
            strong evidence does; ``"auto"`` is full from 8 kinds of challenge on.
        weight: How much H counts beside a one-class score's 1; None as ``trust`` says.
        sees: Names of the blocks that H reads; None for all. What makes H learn its kinds of challenge by heart may
            still serve as a one-class score.
        guard: Whether the one-class scores stand beside H.
        combine: ``"fisher"`` or ``"harmonic"``.
        cap: Largest -log p that one score may contribute.
        components: Gaussians in the mixture; fewer where there is little data.
        dimensions: Principal components of the log norms that the mixture sees, at most.
        neighbours: k of the nearest neighbours.
        calibration_fraction: Share of the clean data held out for calibration: one fit, on less; None for ``folds``.
        folds: Parts of the clean data, where none is held out: what is fitted on the others scores each, so that all
            of it calibrates (cross-conformal prediction, Vovk, 2015). One-class scores stay as they were fitted on
            all parts but one, H is trained once more on everything.
        false_alarm_rate: Share of clean data that `predict` flags.
        random_state: Seed of the split, the mixtures and H.

    Attributes:
        classes_: The two labels, reliable and unreliable.
        contrasts_: Whether a plain X was taken as contrasts; None for named blocks.
        module_: The fitted `DetectorModule`.
    """

    def __init__(
        self,
        *,
        contrasts: bool | str = "auto",
        log: bool = True,
        supervised: str = "network",
        hidden: int = 128,
        members: int = 3,
        dropout: float = 0.0,
        trust: str = "auto",
        weight: float | None = None,
        sees: tuple[str, ...] | None = None,
        guard: bool = True,
        combine: str = "fisher",
        cap: float = 20.0,
        components: int = 8,
        dimensions: int = 24,
        neighbours: int = 10,
        calibration_fraction: float | None = None,
        folds: int = 5,
        false_alarm_rate: float = 0.05,
        random_state: Any = 0,
    ) -> None:
        self.contrasts = contrasts
        self.log = log
        self.supervised = supervised
        self.hidden = hidden
        self.members = members
        self.dropout = dropout
        self.trust = trust
        self.weight = weight
        self.sees = sees
        self.guard = guard
        self.combine = combine
        self.cap = cap
        self.components = components
        self.dimensions = dimensions
        self.neighbours = neighbours
        self.calibration_fraction = calibration_fraction
        self.folds = folds
        self.false_alarm_rate = false_alarm_rate
        self.random_state = random_state

    def fit(
        self,
        X: ArrayLike | Blocks,
        y: ArrayLike | None = None,
        *,
        kinds: ArrayLike | None = None,
        held_out: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> UncertaintyDetector:
        """Fit on features of clean samples, or of clean and challenging ones.

        Args:
            X: Feature matrix ``(B, N)``, ``(B, P)``, ``(B, S, P)``, ``(B, N, P)``, or named blocks. Prefer
                samples that the network was not trained on: it is more certain of its training data.
            y: ``(B,)``, 0 for in-distribution, 1 for challenging; None when all are in-distribution.
            kinds: ``(B,)``, names or numbers that tell kinds of challenge apart; clean samples' are not read.
                H learns more from ten kinds than from one label, and is trusted more.
            held_out: ``(B,)`` of bool, the in-distribution samples to calibrate on, on which nothing is fitted; None
                as ``calibration_fraction`` and ``folds`` say.
            groups: ``(B,)``, integers. A challenging sample that was made from a clean one carries its number, and
                helps to fit nothing that this one calibrates; a number that no clean sample has is of no group. None
                where there are none.

        Returns:
            The detector itself.

        Raises:
            ValueError: X or y is malformed, or there are fewer than 4 in-distribution samples.
        """
        self._check_parameters()
        blocks = self._blocks(X, reset=True)
        count = len(next(iter(blocks.values())))
        challenging, self.classes_ = challenging_of(y, count)
        codes = kinds_of(kinds, challenging)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        if self.sees is not None and (not self.sees or not set(self.sees) <= set(blocks)):
            raise ValueError(
                f"sees must name blocks of X, {', '.join(map(repr, blocks))}; it was {self.sees!r}"
            )
        parts = self.folds if self.calibration_fraction is None else self.calibration_fraction
        kept, splits = deal(challenging, held_out, groups, parts, random)
        fits = [self._parts(blocks, split, codes, seed) for split in splits]
        # New samples are to one fit what left-out ones were to all. To one on everything they would be less unusual:
        # distances depend on how many samples they were fitted on, what H learned hardly does. With a few samples
        # less a score may not exist.
        scores = {name: part for name, part in fits[0].items() if all(name in fit for fit in fits)}
        if len(splits) > 1 and challenging.any():
            scores[H] = self._h(blocks, kept, np.flatnonzero(challenging), codes, seed)
        raw = {name: torch.empty(len(kept), dtype=torch.float64) for name in scores}
        with torch.no_grad():
            for fit, split in zip(fits, splits, strict=True):
                samples = as_tensors(take(blocks, kept[split.scored]))
                for name, own in raw.items():
                    own[split.scored] = fit[name].score(fit[name].rows(samples))
            module = DetectorModule.fit(scores, raw, combine=self.combine, cap=self.cap)
        self.module_ = module.eval()
        return self

    def _parts(
        self, blocks: Mapping[str, Array], split: Split, codes: NDArray[np.intp], seed: int
    ) -> dict[str, Part]:
        """The scores fitted on a split's clean samples, and H on those and its challenging ones."""
        parts: dict[str, Part] = {}
        if self.guard or not codes.any():
            scores = one_class_scores(take(blocks, split.clean), self._settings(seed))
            parts |= {name: Part(rows, score, meaning) for name, rows, score, meaning in scores}
        if codes.any():
            parts[H] = self._h(blocks, split.clean, split.challenging, codes, seed)
        return parts

    def _h(
        self,
        blocks: Mapping[str, Array],
        clean: NDArray[np.intp],
        others: NDArray[np.intp],
        codes: NDArray[np.intp],
        seed: int,
    ) -> Part:
        seen = blocks if self.sees is None else {name: blocks[name] for name in self.sees}
        joint = joint_rows(take(seen, clean), self._settings(seed))
        picked = np.concatenate([clean, others])
        with torch.no_grad():
            rows = joint(as_tensors(take(seen, picked))).numpy()
        h = fit_perceptrons(
            rows,
            codes[picked],
            hidden=self.hidden if self.supervised == "network" else None,
            sees=views(joint.widths, self.members),
            seed=seed,
            dropout=self.dropout,
        )
        return Part(joint, h, OneSided, *self._trust(codes))

    def _settings(self, seed: int) -> Settings:
        return Settings(self.log, self.components, self.dimensions, self.neighbours, seed)

    def decision_function(self, X: ArrayLike | Blocks) -> Array:
        """Unreliability ``(B,)``: -log of the p-value. Higher is less reliable; compare with `threshold`."""
        check_is_fitted(self, "module_")
        blocks = self._blocks(X, reset=False)
        with torch.no_grad():
            scores = [self.module_(part) for part in chunks(blocks)]
        result: Array = torch.cat(scores).numpy()
        return result

    def predict_proba(self, X: ArrayLike | Blocks) -> Array:
        """``(B, 2)``: the p-value "a clean sample looks at least so unusual", and one minus it."""
        p = np.exp(-self.decision_function(X))
        return np.stack([p, 1 - p], 1)

    def predict(self, X: ArrayLike | Blocks) -> NDArray[Any]:
        """``(B,)``: the label of "unreliable" above the threshold, else that of "reliable"."""
        flagged = self.decision_function(X) > self.threshold()
        result: NDArray[Any] = self.classes_[flagged.astype(np.intp)]
        return result

    def threshold(self, false_alarm_rate: float | None = None) -> float:
        """The `decision_function` value that a share ``false_alarm_rate`` of clean data exceeds.

        Args:
            false_alarm_rate: In (0, 1); the estimator's own when None.
        """
        check_is_fitted(self, "module_")
        rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        return -math.log(check_rate(rate))

    def score(self, X: ArrayLike | Blocks, y: ArrayLike) -> float:
        """AUROC of `decision_function` for labels ``y``: what model selection maximises."""
        from sklearn.metrics import roc_auc_score

        scores = self.decision_function(X)
        values = np.asarray(y).ravel()
        if len(values) != len(scores):
            raise ValueError(f"y must have one label per row of X, {len(scores)}; it had {len(values)}")
        return float(roc_auc_score(values == self.classes_[1], scores))

    def explain(self, X: ArrayLike | Blocks) -> dict[str, Array]:
        """Each part's own -log p ``(B,)`` by name: what made a sample suspicious."""
        check_is_fitted(self, "module_")
        with torch.no_grad():
            parts = self.module_.parts(as_tensors(self._blocks(X, reset=False)))
        return {name: values.numpy() for name, values in parts.items()}

    def to_module(self) -> DetectorModule:
        """The fitted detector as a traceable module: named blocks of tensors in, `decision_function` out."""
        check_is_fitted(self, "module_")
        return self.module_

    def __sklearn_tags__(self) -> Tags:
        from sklearn.utils import ClassifierTags

        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = bool(self.log)
        tags.input_tags.three_d_array = True
        tags.target_tags.required = False
        tags.classifier_tags = ClassifierTags(multi_class=False)
        return tags

    def _check_parameters(self) -> None:
        checks.one_of("contrasts", self.contrasts, ("auto", True, False))
        checks.is_bool("log", self.log)
        checks.is_bool("guard", self.guard)
        checks.one_of("supervised", self.supervised, ("network", "logistic"))
        checks.one_of("combine", self.combine, COMBINATIONS)
        for name in ("hidden", "members", "components", "dimensions", "neighbours"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; it was {value!r}")
        if not float(self.cap) > 0:
            raise ValueError(f"cap must be greater than 0; it was {self.cap!r}")
        if self.calibration_fraction is not None and not 0 < float(self.calibration_fraction) < 1:
            raise ValueError(f"calibration_fraction must lie in (0, 1); it was {self.calibration_fraction!r}")
        if not isinstance(self.folds, (int, np.integer)) or self.folds < 2:
            raise ValueError(f"folds must be an integer of at least 2; it was {self.folds!r}")
        if not 0 <= float(self.dropout) < 1:
            raise ValueError(f"dropout must lie in [0, 1); it was {self.dropout!r}")
        checks.one_of("trust", self.trust, ("auto", "full", "cautious"))
        if self.weight is not None and not float(self.weight) > 0:
            raise ValueError(f"weight must be greater than 0 or None; it was {self.weight!r}")
        check_rate(self.false_alarm_rate)

    def _blocks(self, X: ArrayLike | Blocks, *, reset: bool) -> dict[str, Array]:
        """X as named blocks, checked against those seen in `fit` unless ``reset``."""
        # One of SciPy's sparse formats is a dictionary.
        if isinstance(X, Mapping) and not issparse(X):
            blocks = check_blocks(X, log=self.log)
            if reset:
                self.contrasts_ = None
        else:
            if getattr(X, "ndim", None) == 3:
                array = to_array("X", X)
                if array.size == 0:
                    raise ValueError(f"X must not be empty; it had shape {array.shape}")
                if reset:
                    self.n_features_in_ = int(np.prod(array.shape[1:]))
            else:
                if isinstance(X, torch.Tensor):
                    X = to_array("X", X)
                array = validate_data(self, X, reset=reset, dtype=np.float64)
            if self.log:
                check_squared("X", array)
            if reset:
                self.contrasts_ = are_contrasts(array) if self.contrasts == "auto" else bool(self.contrasts)
            blocks = {"contrasts" if self.contrasts_ else "gradients": array}
        shapes = {name: array.shape[1:] for name, array in blocks.items()}
        if reset:
            self.shapes_ = shapes
        elif shapes != self.shapes_:
            raise ValueError(f"X must have the blocks and shapes of fit, {self.shapes_}; it had {shapes}")
        return blocks

    def _trust(self, codes: NDArray[np.intp]) -> tuple[float, float]:
        """H's weight beside a one-class score's 1, and the p-value below which it counts at all.

        H generalises from many kinds of challenge to others. From a few it does not: it calls what it has not
        seen safe, and would outvote the guard. Then only p-values below 0.1 count, so that nine tenths of the
        clean samples, and whatever H takes for clean, are judged by the guard alone.
        """
        if self.weight is not None:
            return float(self.weight), 1.0
        few = len(np.unique(codes)) - 1 < 8
        cautious = self.trust == "cautious" or (self.trust == "auto" and few)
        return (1.5, 0.1) if cautious and self.guard else (3.0, 1.0)
