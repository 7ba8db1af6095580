"""H, the detector trained on labels: clean rows against challenging ones. Fitted by scikit-learn, scored in torch."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fitted import Fitted

Array = NDArray[np.float64]


class Perceptron(Fitted):
    """Log odds of "challenging" from rows: a linear map, or a two-layer network with ReLU."""

    weight: Tensor
    bias: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        """Log odds ``(B,)`` of ``rows`` ``(B, d)``."""
        if "hidden_weight" in self._buffers:
            rows = torch.relu(rows @ self.get_buffer("hidden_weight") + self.get_buffer("hidden_bias"))
        return rows @ self.weight + self.bias


def fit_perceptron(
    rows: Array, challenging: NDArray[np.bool_], *, hidden: int | None, seed: int
) -> Perceptron:
    """H from ``rows`` ``(n, d)`` and labels ``(n,)``; ``hidden=None`` is logistic regression.

    Both classes count alike, however many samples each has.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        # The iteration limit is a choice (early stopping for the network), not a failure to report.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if hidden is None:
            linear = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500)
            linear.fit(rows, challenging)
            weight = torch.as_tensor(linear.coef_[0].astype(np.float64))
            return Perceptron(
                weight=weight, bias=torch.tensor(float(linear.intercept_[0]), dtype=torch.float64)
            )
        rng = np.random.default_rng(seed)
        sides = [np.flatnonzero(challenging == side) for side in (False, True)]
        largest = max(map(len, sides))
        chosen = np.concatenate(
            [side if len(side) == largest else rng.choice(side, largest) for side in sides]
        )
        network = MLPClassifier(
            (hidden,), alpha=1e-2, batch_size=min(256, len(chosen)), early_stopping=len(chosen) >= 200,
            max_iter=60, n_iter_no_change=6, random_state=seed,
        )  # fmt: skip
        network.fit(rows[chosen], challenging[chosen])
    arrays = [torch.as_tensor(np.ascontiguousarray(part, dtype=np.float64)) for part in network.coefs_]
    biases = [torch.as_tensor(np.ascontiguousarray(part, dtype=np.float64)) for part in network.intercepts_]
    return Perceptron(
        hidden_weight=arrays[0], hidden_bias=biases[0], weight=arrays[1][:, 0], bias=biases[1][0]
    )
