"""`UncertaintyDetector`: how unusual each sample is, from features of clean data and of challenges, if any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import ClassifierTags, Tags, check_random_state
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits
from torch import Tensor

from fastgrad import checks
from fastgrad.blocks import BLOCKS
from fastgrad.blocks.features import Features
from fastgrad.checks import Array
from fastgrad.detector import constants, inputs
from fastgrad.detector.calibrate import Calibrated, DetectorModule, calibrate
from fastgrad.detector.inputs import BlocksByName
from fastgrad.scores.rows import as_tensor

FeatureInput = ArrayLike | Mapping[str, ArrayLike]


class UncertaintyDetector(BaseEstimator):  # type: ignore[misc]
    """Scores how far each sample lies from clean data; higher is less reliable.

    One-class scores of clean data become p-values, two-sided where either side is unusual. With challenges, a linear
    classifier adds a score. The weighted sum of the logarithms of all p-values is calibrated once more. The score is
    ``-log(p)``, where p is the probability that a clean sample looks at least this unusual. A share ``a`` of clean data
    is above ``threshold(a)``, which is -log(a); `fastgrad.detector.calibrate` says how exactly.

    Features are an array of gradient norms, or a mapping of named blocks (see `fastgrad.blocks`).

    Args:
        log: True takes the logarithm of a plain array, or of a block of gradient norms: they are squared norms. False
            takes features of any sign as they are, such as logarithms of norms.
        folds: Folds of the clean data, each scored by a fit on the others. None means ten below 300 samples, five from
            300 on, and three if a part is held out.
        calibration_fraction: Share of the clean data used only for calibration, which makes the false-alarm rate exact.
            None means a fifth from 1,000 clean samples on, and no share below. If samples share ``sources``,
            it is a share of the sources, and one sample of each calibrates.
        false_alarm_rate: Share of clean data that `predict` flags.
        random_state: Seed of the folds and the held-out part.

    Attributes:
        classes_: The two labels, reliable and unreliable.
        module_: The fitted `DetectorModule`.
        shapes_: Shape of one sample of each block.
    """

    def __init__(
        self,
        *,
        log: bool = True,
        folds: int | None = None,
        calibration_fraction: float | None = None,
        false_alarm_rate: float = 0.05,
        random_state: Any = 0,
    ) -> None:
        self.log = log
        self.folds = folds
        self.calibration_fraction = calibration_fraction
        self.false_alarm_rate = false_alarm_rate
        self.random_state = random_state

    def fit(
        self,
        X: FeatureInput,
        y: ArrayLike | None = None,
        *,
        kinds: ArrayLike | None = None,
        held_out: ArrayLike | None = None,
        sources: ArrayLike | None = None,
    ) -> UncertaintyDetector:
        """Fit on features of clean samples, or of clean and challenging ones; return the detector itself.

        Args:
            X: Feature matrix ``(B, P)`` or ``(B, S, P)``, or named blocks. Prefer samples that the network was not
                trained on: it is more certain of its training data.
            y: ``(B,)``, 0 for in-distribution, 1 for challenging; None when all are in-distribution.
            kinds: ``(B,)``, names or numbers of the kinds of challenge; ignored for clean samples. The classifier
                learns more from ten kinds than from one label.
            held_out: ``(B,)`` of bool, the in-distribution samples that calibrate, on which nothing is fitted; None
                follows ``calibration_fraction``.
            sources: ``(B,)``, the source of each sample as an integer; a clean image and its challenges share one. No
                source is on both sides of a fit. Negative numbers, and None for all, are sources of their own.

        Raises:
            ValueError: X or y is malformed, or there are fewer than 4 in-distribution samples.
        """
        blocks = self._blocks(X, reset=True)
        count = len(next(iter(blocks.values())))
        challenging, self.classes_ = inputs.challenging_of(y, count)
        names, numbers = inputs.kinds_of(kinds, challenging), checks.sources_of(sources, count)
        random = check_random_state(self.random_state)
        calibrating = inputs.held_out_of(held_out, challenging, numbers, self.calibration_fraction, random)
        features = Features.of(
            torch.empty((count, 0), device="cpu"), blocks, kinds=names, sources=torch.from_numpy(numbers),
            held_out=torch.from_numpy(calibrating),
        )  # fmt: skip
        self.module_ = fit_detector(self, features, BLOCKS, random).module
        return self

    def decision_function(self, X: FeatureInput) -> Array:
        """Return the uncertainty ``(B,)``: -log of the p-value. Higher is less reliable; compare with `threshold`."""
        module, blocks = self.to_module(), self._blocks(X, reset=False)
        # Some samples at a time, so that a large set needs little memory.
        parts = zip(*(values.split(4096) for values in blocks.values()), strict=True)
        result: Array = torch.cat([module(dict(zip(blocks, part, strict=True))) for part in parts]).numpy()
        return result

    def predict(self, X: FeatureInput) -> NDArray[Any]:
        """Return labels ``(B,)``: the second of ``classes_`` above the threshold, else the first."""
        checks.lies_in("(0, 1)", false_alarm_rate=self.false_alarm_rate)
        flagged = self.decision_function(X) > -np.log(self.false_alarm_rate)
        result: NDArray[Any] = self.classes_[flagged.astype(np.intp)]
        return result

    def threshold(self, false_alarm_rate: float | None = None) -> float:
        """Return the `decision_function` value that a share ``false_alarm_rate`` of clean data exceeds.

        Args:
            false_alarm_rate: In (0, 1); the estimator's own if None. A warning is given for a rate below
                ``1 / (n + 1)``, which calibration samples of n sources cannot promise.
        """
        return self.to_module().threshold(self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate)

    def score(self, X: FeatureInput, y: ArrayLike) -> float:
        """Return the AUROC of `decision_function` for labels ``y``, which model selection maximises."""
        from sklearn.metrics import roc_auc_score

        scores = self.decision_function(X)
        values = np.asarray(y).ravel()
        if len(values) != len(scores):
            raise ValueError(f"y must have one label per row of X, {len(scores)}; it had {len(values)}")
        # A fold of ordered data may have one label only, which scikit-learn would score as NaN.
        if not np.array_equal(np.unique(values), self.classes_):
            raise ValueError(
                f"y must hold labels of fit, {self.classes_.tolist()}; it held {np.unique(values)[:5]}. Both must be "
                "there, in each fold as well: use a StratifiedKFold"
            )
        return float(roc_auc_score(values == self.classes_[1], scores))

    def explain(self, X: FeatureInput) -> dict[str, Array]:
        """Return the evidence ``(B,)`` by name of block, and of the challenge classifier as ``"challenges"``.

        A block's evidence is the sum of the capped, weighted -log p of its scores. `decision_function` increases with
        the sum of all evidence.
        """
        module = self.to_module()
        _, evidence, _ = module.explain(self._blocks(X, reset=False))
        return {name: values.numpy() for name, values in zip(module.evidence_names, evidence.T, strict=True)}

    def to_module(self) -> DetectorModule:
        """Return the fitted detector as a traceable module: named blocks of tensors in, `decision_function` out."""
        check_is_fitted(self, "module_")
        return self.module_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = bool(self.log)
        tags.input_tags.three_d_array = True
        tags.target_tags.required = False
        tags.classifier_tags = ClassifierTags(multi_class=False)
        return tags

    def _blocks(self, X: FeatureInput, *, reset: bool) -> dict[str, Tensor]:
        """Return X as named blocks, checked against those seen in `fit` unless ``reset``."""
        # One of SciPy's sparse formats is a dictionary, too.
        if isinstance(X, Mapping) and not issparse(X):
            blocks = inputs.check_blocks(X, BLOCKS, log=self.log)
        else:
            array = checks.validated(self, "X", X, reset=reset)
            if self.log:
                inputs.check_squared("X", array)
            blocks = {"gradients": as_tensor(array)}
        shapes = {name: tuple(values.shape[1:]) for name, values in blocks.items()}
        if reset:
            self.shapes_ = shapes
        elif shapes != self.shapes_:
            raise ValueError(f"X must have the blocks and shapes of fit, {self.shapes_}; it had {shapes}")
        return blocks


def fit_detector(
    detector: UncertaintyDetector, features: Features, by_name: BlocksByName, random: np.random.RandomState
) -> Calibrated:
    """Fit a detector with the options of ``detector``; return also what fits without each sample say about it."""
    checks.is_bool(log=detector.log)
    if detector.folds is not None and (not isinstance(detector.folds, (int, np.integer)) or detector.folds < 2):
        raise ValueError(f"folds must be an integer of at least 2 or None; it was {detector.folds!r}")
    checks.lies_in("(0, 1)", false_alarm_rate=detector.false_alarm_rate)
    few = int((~features.challenging).sum()) < constants.FEW
    usual = constants.FOLDS_OF_FEW if few else constants.FOLDS
    folds = detector.folds or (constants.FOLDS_OF_SPLIT if features.held_out.any() else usual)
    # Products are small: the spinning threads of NumPy and PyTorch would wait for each other, three times as long.
    with threadpool_limits(limits=1):
        calibrated = calibrate(features, by_name, int(folds), random, log=detector.log)
    calibrated.module.options["false_alarm_rate"] = float(detector.false_alarm_rate)
    return calibrated
