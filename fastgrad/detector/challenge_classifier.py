"""The challenge classifier: one multinomial logistic regression of clean inputs and kinds of challenge.

Its score is minus the log probability of "clean". It detects challenges better if it learns their kinds than if it
learns two classes. Clean and challenging samples have the same total weight. The weights of a linear map can be read,
and the objective has one minimum, so that nothing depends on a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastgrad.detector.constants import INVERSE_PENALTY, LIMIT, STEPS
from fastgrad.scores.fitted import Fitted, FittedList
from fastgrad.scores.rows import clipped
from fastgrad.scores.softmax_regression import equal_shares, fit_softmax


class JointRows(Fitted):
    """Rows of several blocks side by side, ``(B, d)``."""

    parts: FittedList

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return standardised rows, clipped at 50 standard deviations."""
        return clipped(torch.cat([rows(blocks) for rows in self.parts], -1), LIMIT)


class ChallengeClassifier(Fitted):
    """Log probabilities of a linear map to classes, of which the first is "clean"."""

    weight: Tensor  # (d, C)
    bias: Tensor  # (C,)

    @classmethod
    def fit(cls, rows: Tensor, codes: Tensor, classes: int) -> ChallengeClassifier:
        """Minimise the cross-entropy of rows ``(n, d)`` plus ``||W||^2 / (2 c n)``; c is `INVERSE_PENALTY`.

        ``codes`` ``(n,)`` are 0 for clean samples and other numbers for challenges; both must occur. Those of the C
        ``classes`` that do not occur get probability 0.
        """
        absent = torch.where(torch.bincount(codes, minlength=classes) == 0, -torch.inf, torch.zeros((), device="cpu"))
        penalty = 1 / (INVERSE_PENALTY * len(rows))
        values = fit_softmax(rows, codes, equal_shares(codes > 0), absent, penalty, steps=STEPS)
        return cls(weight=values[:-1], bias=values[-1] + absent)

    def forward(self, rows: Tensor) -> Tensor:
        """Return log probabilities ``(B, C)`` of ``rows`` ``(B, d)``."""
        return torch.log_softmax(rows @ self.weight + self.bias, -1)
