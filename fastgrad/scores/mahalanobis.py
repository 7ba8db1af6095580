"""Mahalanobis distance with a shrunk covariance, in few dimensions or in many more than there are samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.scores.fitted import Fitted, as_buffer
from fastgrad.scores.spectrum import principal, shrinkage

#: Leading directions that have a variance of their own. From 16 to 400 of them the AUROC of photographs was the same to
#: .002, of EfficientNet-Lite1 and Lite2; each costs time with every input.
DIRECTIONS = 32


class Mahalanobis(Fitted):
    """Squared Mahalanobis distance to the mean, its covariance shrunk towards a multiple of the identity.

    With the sample covariance's eigenvalues ``lambda_i``, their mean m over all d columns, directions ``v_i`` and
    the shrinkage rho of Ledoit and Wolf ("A well-conditioned estimator for large-dimensional covariance
    matrices", 2004),

        ``s(z) = sum_i w_i (v_i z)^2 + w (||z||^2 - sum_i (v_i z)^2)``, ``w_i = 1 / ((1 - rho) lambda_i + rho m)``,

    z being the row minus the mean. The second term holds all directions but the r leading ones; they share the
    mean of their eigenvalues (Tipping and Bishop, "Probabilistic principal component analysis", 1999).

    Buffers: ``mean`` ``(d,)``; ``directions`` ``(d, r)``; ``weights`` ``(r,)``; ``rest`` ``()``, the weight of what
    lies outside the directions, 0 where they span everything.
    """

    mean: Tensor
    directions: Tensor
    weights: Tensor
    rest: Tensor

    @classmethod
    def fit(cls, rows: NDArray[np.float64], directions: int = DIRECTIONS) -> Mahalanobis:
        """From clean rows ``(n, d)``; at most so many directions."""
        values = as_buffer(rows)
        d = values.shape[1]
        mean = values.mean(0)
        centred = values - mean
        variances, leading = principal(centred, min(directions, d))
        rho, average = shrinkage(variances, centred)
        # Where nothing varies, any scale does.
        floor = max(rho * average, 1e-10 * float(variances[0])) or 1.0
        rank = leading.shape[1]
        outside = (d * average - variances[:rank].sum()).clamp(min=0) / max(1, d - rank)
        rest = 1 / ((1 - rho) * outside + floor)
        return cls(
            mean=mean,
            directions=leading,
            weights=1 / ((1 - rho) * variances[:rank] + floor),
            rest=rest if rank < d else torch.zeros_like(rest),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``, float64."""
        centred = rows - self.mean
        squares = (centred @ self.directions).square()
        outside = (centred.square().sum(-1) - squares.sum(-1)).clamp(min=0)
        return squares @ self.weights + self.rest * outside
