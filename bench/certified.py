"""Certified thresholds: how often the promise is broken, and how much is answered, beside MAPIE and zugzwang.

    python -m bench.certified

The tables are zugzwang's; those of OpenML need its server. A gradient boosting is trained on six tenths of a table. The
others are the population: a calibration sample is drawn from it with replacement, and the error rate and the coverage
of its threshold are those of the population. ``no guarantee`` takes the largest threshold whose answers in the sample
are right often enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import fetch_openml, load_breast_cancer, load_digits
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OrdinalEncoder

from bench.report import pages
from fastgrad.metrics import certified_threshold

Values = NDArray[np.float64]
#: Numbers of OpenML.
TABLES = {
    "adult": 1590, "bank-marketing": 1461, "electricity": 151, "spambase": 44, "credit-g": 31, "higgs": 23512,
    "phoneme": 1489, "PhishingWebsites": 4534, "satimage": 182, "pendigits": 32, "letter": 6, "covertype": 1596,
    "GesturePhaseSegmentationProcessed": 4538,
}  # fmt: skip
#: Classes and distance of the Gaussians from the middle.
SYNTHETIC = {"synthetic": (2, 1.0), "synthetic-mc": (4, 2.0)}
#: Tables of scikit-learn, not zugzwang's.
OWN = {"digits": load_digits, "breast cancer": load_breast_cancer}
LARGEST, SAMPLE = 20_000, 1000
#: Calibration samples for fastgrad, and for the slower others.
RESAMPLES, FEWER = 1000, 200
LIMITS, CONFIDENCES = (0.02, 0.05), (0.9, 0.95, 0.99)


def gaussians(classes: int, radius: float) -> tuple[Values, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, LARGEST)
    angles = 2 * np.pi * labels / classes
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.normal(size=(LARGEST, 2)), labels


def population(name: str) -> tuple[Values, NDArray[np.bool_]]:
    """Return 1 - the largest probability and whether the answer is wrong, of samples that were not trained on."""
    if name in SYNTHETIC:
        columns, labels = gaussians(*SYNTHETIC[name])
    elif name in OWN:
        columns, labels = OWN[name](return_X_y=True)
    else:
        frame = fetch_openml(data_id=TABLES[name], as_frame=True)
        columns, labels = OrdinalEncoder().fit_transform(frame.data), frame.target.to_numpy()
    columns, labels = columns[:LARGEST], labels[:LARGEST]
    seen, others, known, truth = train_test_split(columns, labels, train_size=0.6, random_state=0, stratify=labels)
    model = HistGradientBoostingClassifier(max_iter=100, random_state=0).fit(seen, known)
    probabilities = model.predict_proba(others)
    return 1 - probabilities.max(1), model.classes_[probabilities.argmax(1)] != truth


def largest(risk: Values, errors: Values, limit: float, confidence: float) -> float | None:
    """Return the largest threshold whose answers in the sample are right often enough."""
    order = np.argsort(risk)
    rates = errors[order].cumsum() / np.arange(1, len(risk) + 1)
    right = np.flatnonzero(rates <= limit)
    return float(risk[order[right[-1]]]) if len(right) else None


def zugzwang(risk: Values, errors: Values, limit: float, confidence: float) -> float | None:
    from zugzwang.core import certify_threshold
    from zugzwang.core.guarantees.base import UncertifiableRiskError

    try:
        return -float(certify_threshold(-risk, errors, limit, 1 - confidence).threshold)
    except UncertifiableRiskError:
        return None


def mapie(how: str) -> Callable[[Values, Values, float, float], float | None]:
    """Return MAPIE's threshold of the confidence that keeps the precision of the answers."""

    def threshold(risk: Values, errors: Values, limit: float, confidence: float) -> float | None:
        from mapie.risk_control import BinaryClassificationController

        controller = BinaryClassificationController(
            lambda x: np.stack([x[:, 0], 1 - x[:, 0]], 1), "precision", 1 - limit, confidence, fwer_method=how
        )
        controller.calibrate(risk[:, None], 1 - errors.astype(int))
        found = controller.best_predict_param
        return None if found is None else 1 - float(found)

    return threshold


METHODS: dict[str, Callable[[Values, Values, float, float], float | None]] = {
    "fastgrad": certified_threshold, "zugzwang": zugzwang, "MAPIE": mapie("bonferroni_holm"),
    "MAPIE, fixed sequence": mapie("fixed_sequence"), "no guarantee": largest,
}  # fmt: skip


def measure() -> Iterator[dict[str, Any]]:
    for name in (*SYNTHETIC, *OWN, *TABLES):
        try:
            risk, errors = population(name)
        except OSError as why:
            yield {"table": name, "not run": f"OpenML cannot be reached ({type(why).__name__})"}
            continue
        order = np.argsort(risk)
        rates = errors[order].cumsum() / np.arange(1, len(risk) + 1)
        for limit in LIMITS:
            for confidence in CONFIDENCES:
                for method, threshold in METHODS.items():
                    rng = np.random.default_rng(0)
                    broken, answered = [], []
                    for _ in range(RESAMPLES if method == "fastgrad" else FEWER):
                        places = rng.integers(0, len(risk), SAMPLE)
                        found = threshold(risk[places], errors[places].astype(float), limit, confidence)
                        # Rounding by 1 - p of a threshold must not lose the sample that it is.
                        count = 0 if found is None else int(np.searchsorted(risk[order], found + 1e-12))
                        answered.append(count / len(risk))
                        broken.append(count > 0 and rates[count - 1] > limit)
                    yield {
                        "table": name, "limit": limit, "confidence": confidence, "method": method,
                        "wrong": round(float(errors.mean()), 4), "broken": round(float(np.mean(broken)), 4),
                        "coverage": round(float(np.mean(answered)), 4),
                        "none": round(float(np.mean(np.equal(answered, 0))), 4),
                    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pages.command(
        "certified", __doc__, measure, packages=("numpy", "scikit-learn", "mapie", "zugzwang"),
        facts={"sample": SAMPLE, "resamples": [RESAMPLES, FEWER]},
    )  # fmt: skip
