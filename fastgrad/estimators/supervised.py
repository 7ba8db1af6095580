"""H, the detector trained on labels: fitted by scikit-learn, scored in torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.scores.fitted import Fitted, Sequence

Array = NDArray[np.float64]

# Standardised rows are cut here, so that no single feature, however far out, decides alone.
_LIMIT = 50.0


class Joint(Fitted):
    """Rows of several blocks side by side, ``(B, d)``."""

    parts: Sequence

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Standardised rows, cut at 50 standard deviations."""
        return torch.cat([rows(blocks) for rows in self.parts], -1).clamp(-_LIMIT, _LIMIT)


class Perceptrons(Fitted):
    """Mean over M networks of -log P(clean): a two-layer network with ReLU each, or one linear map.

    Buffers: ``weight`` ``(M, h, C)``, ``bias`` ``(M, 1, C)`` and, with a hidden layer, ``hidden_weight``
    ``(M, d, h)``, ``hidden_bias`` ``(M, 1, h)``. Class 0 of C is "clean", the others are kinds of challenge.
    """

    weight: Tensor
    bias: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``; higher is less like clean data."""
        hidden = rows.unsqueeze(0)
        if "hidden_weight" in self._buffers:
            hidden = torch.relu(
                torch.matmul(hidden, self.get_buffer("hidden_weight")) + self.get_buffer("hidden_bias")
            )
        logits = torch.matmul(hidden, self.weight) + self.bias
        return -torch.log_softmax(logits, -1)[..., 0].mean(0)


def fit_perceptrons(
    rows: Array, kinds: NDArray[np.intp], *, hidden: int | None, members: int, seed: int
) -> Perceptrons:
    """H from ``rows`` ``(n, d)`` and ``kinds`` ``(n,)``: 0 for clean, others for kinds of challenge.

    Telling the kinds apart makes a better "clean or not" than that question alone. Clean and challenging
    samples count alike in all, however many there are. ``hidden=None`` is logistic regression.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    _, codes = np.unique(kinds, return_inverse=True)
    # Half the time of float64; what is learned differs by less than between two seeds.
    rows = rows.astype(np.float32)
    parts: list[tuple[list[Any], list[Any]]] = []
    with warnings.catch_warnings():
        # The iteration limit is a choice, with early stopping, not a failure to report.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if hidden is None:
            weights = np.where(codes == 0, 0.5 / max(1, (codes == 0).sum()), 0.5 / max(1, (codes > 0).sum()))
            linear = LogisticRegression(C=0.1, max_iter=500)
            linear.fit(rows, codes, sample_weight=weights * len(rows))
            parts.append(([linear.coef_.T], [linear.intercept_]))
        else:
            for member in range(members):
                rng = np.random.default_rng([seed, member])
                clean, challenging = np.flatnonzero(codes == 0), np.flatnonzero(codes > 0)
                size = max(len(clean), len(challenging))
                chosen = np.concatenate([_resample(side, size, rng) for side in (clean, challenging)])
                network = MLPClassifier(
                    (hidden,),
                    alpha=0.1,
                    batch_size=min(256, max(16, len(chosen) // 40), len(chosen)),
                    early_stopping=len(chosen) >= 400,
                    max_iter=60,
                    n_iter_no_change=6,
                    random_state=seed % 2**30 + member,
                )
                network.fit(rows[chosen], codes[chosen])
                parts.append((network.coefs_, network.intercepts_))
    parts = [_two_outputs(weights, biases) for weights, biases in parts]
    names = ["hidden_weight", "hidden_bias", "weight", "bias"][-2 * len(parts[0][0]) :]
    stacked = [
        torch.as_tensor(np.stack([part[kind][layer] for part in parts]).astype(np.float64))
        for layer in range(len(parts[0][0]))
        for kind in (0, 1)
    ]
    return Perceptrons(
        **{
            name: value.unsqueeze(1) if value.dim() == 2 else value
            for name, value in zip(names, stacked, strict=True)
        }
    )


def _resample(indices: NDArray[np.intp], size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """``indices`` with repetitions up to ``size``: whole copies first, then a random rest."""
    whole, rest = divmod(size, len(indices))
    return np.concatenate([np.tile(indices, whole), rng.choice(indices, rest, replace=False)])


def _two_outputs(weights: list[Any], biases: list[Any]) -> tuple[list[Any], list[Any]]:
    """Scikit-learn's single log odds of two classes as two logits, the first of them zero."""
    if weights[-1].shape[1] > 1:
        return weights, biases
    last, bias = weights[-1], biases[-1]
    return (
        [*weights[:-1], np.concatenate([np.zeros_like(last), last], 1)],
        [*biases[:-1], np.concatenate([np.zeros_like(bias), bias])],
    )
