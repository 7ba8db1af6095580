"""Mahalanobis distance with a shrunk covariance, in few dimensions or in many more than there are samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fitted import Fitted, as_buffer
from .spectrum import principal, shrinkage

#: What leaving out directions may change: the spread of the scores' change over the scores' own spread.
LOSS = 0.02
#: Of the rows, one in so many judges how many directions are needed.
_JUDGES = 5


class Mahalanobis(Fitted):
    """Squared Mahalanobis distance to the mean, its covariance shrunk towards a multiple of the identity.

    With the sample covariance's eigenvalues ``lambda_i``, their mean m over all d columns, directions ``v_i``
    and the shrinkage rho of Ledoit and Wolf ("A well-conditioned estimator for large-dimensional covariance
    matrices", 2004),

        ``s(z) = sum_i w_i (v_i z)^2 + (||z||^2 - sum_i (v_i z)^2) / (rho m)``,
        ``w_i = 1 / ((1 - rho) lambda_i + rho m)``,

    z being the row minus the mean. The second term holds every direction in which the n clean rows have no
    variance, so nothing of size ``(d, d)`` is formed where d is above n. Only as many leading directions are
    kept as the order of held-out clean rows needs, the others count as if they had no variance.

    Buffers: ``mean`` ``(d,)``; ``directions`` ``(d, r)``, float32; ``weights`` ``(r,)``; ``rest``, the weight
    of what lies outside the directions, 0 where they span everything.
    """

    mean: Tensor
    directions: Tensor
    weights: Tensor
    rest: Tensor

    @classmethod
    def fit(cls, rows: NDArray[np.float64], *, loss: float = LOSS, most: int = 8 * 2**20) -> Mahalanobis:
        """From clean rows.

        Args:
            rows: ``(n, d)``.
            loss: How much leaving out directions may change the scores of held-out rows: the standard
                deviation of the change over the standard deviation of the scores. 0 keeps all directions.
            most: Bytes that the directions may take; fewer are kept than ``loss`` asks for if they take more.
        """
        values = torch.as_tensor(rows)
        n, d = values.shape
        rank = min(max(1, most // (4 * d)), d)
        if loss > 0 and n >= 2 * _JUDGES:
            judges = torch.arange(n) % _JUDGES == 0
            rank = min(rank, _needed(_full(values[~judges]), values[judges], loss))
        return _full(values).leading(rank)

    def leading(self, rank: int) -> Mahalanobis:
        """The same distance with the first ``rank`` directions; the others count as without variance."""
        return Mahalanobis(
            mean=self.mean,
            directions=self.directions[:, :rank].float(),
            weights=self.weights[:rank],
            rest=self.rest if rank < self.directions.shape[0] else torch.zeros_like(self.rest),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``, in the dtype of the rows."""
        centred = rows - self.mean
        squares = (centred.to(self.directions.dtype) @ self.directions).to(rows.dtype).square()
        rest = (centred.square().sum(-1) - squares.sum(-1)).clamp(min=0)
        return squares @ self.weights + self.rest * rest


def _full(rows: Tensor) -> Mahalanobis:
    """All directions in which ``rows`` vary, in float64."""
    n, d = rows.shape
    mean = rows.mean(0)
    centred = rows - mean
    values, directions = principal(centred)
    rho, average = shrinkage(values, centred)
    floor = max(rho * average, 1e-10 * float(values[0]) if len(values) else 1.0)
    return Mahalanobis(
        mean=mean,
        directions=directions,
        weights=1 / ((1 - rho) * values + floor),
        rest=as_buffer(1 / floor if len(values) < d else 0.0),
    )


def _needed(full: Mahalanobis, rows: Tensor, loss: float) -> int:
    """The fewest directions, of powers of two, that score ``rows`` as all directions do."""
    wanted = full(rows)
    most = full.directions.shape[1]
    rank = 4
    while rank < most:
        change = full.leading(rank)(rows) - wanted
        if float(change.std()) <= loss * float(wanted.std()):
            return rank
        rank *= 2
    return most
