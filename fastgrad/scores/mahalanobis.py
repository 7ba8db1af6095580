"""Mahalanobis distance with a shrunk covariance, in few dimensions or in many more than there are samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.scores.fitted import Fitted, as_buffer
from fastgrad.scores.spectrum import principal, shrinkage

#: The number of directions is chosen on at most so many rows, of which one in `_JUDGES` judges.
_SAMPLE = 1000
_JUDGES = 5
#: So many of the first directions are multiplied in float64. Most of a row's length lies along them, and what lies
#: outside, which weighs most, is the difference: rounding of these products is magnified as no other is.
_EXACT = 8


class Mahalanobis(Fitted):
    """Squared Mahalanobis distance to the mean, its covariance shrunk towards a multiple of the identity.

    With the sample covariance's eigenvalues ``lambda_i``, their mean m over all d columns, directions ``v_i`` and
    the shrinkage rho of Ledoit and Wolf ("A well-conditioned estimator for large-dimensional covariance
    matrices", 2004),

        ``s(z) = sum_i w_i (v_i z)^2 + w (||z||^2 - sum_i (v_i z)^2)``, ``w_i = 1 / ((1 - rho) lambda_i + rho m)``,

    z being the row minus the mean. The second term holds all directions but the r leading ones; they share the
    mean of their eigenvalues (Tipping and Bishop, "Probabilistic principal component analysis", 1999). With n
    rows and d above n that is 0 once r is n - 1, and w is ``1 / (rho m)``: the distance of Ledoit and Wolf,
    without anything of size ``(d, d)``. No more directions are kept than the order of clean rows needs.

    Buffers: ``mean`` ``(d,)``; ``directions`` ``(d, r)``, float32; ``weights`` ``(r,)``; ``rest`` ``()``, the weight
    of what lies outside the directions, 0 where they span everything.
    """

    mean: Tensor
    directions: Tensor
    weights: Tensor
    rest: Tensor

    @classmethod
    def fit(
        cls,
        rows: NDArray[np.float64],
        *,
        agreement: float = 0.99,
        least: int = 2**20,
        most: int = 8 * 2**20,
    ) -> Mahalanobis:
        """From clean rows.

        Args:
            rows: ``(n, d)``.
            agreement: Rank correlation of the scores of clean rows that took no part in fitting, with the kept
                directions and with ``most``, that decides how many are kept.
            least: Bytes of directions that are kept in any case.
            most: Bytes that the directions may take, at most.
        """
        values = as_buffer(rows)
        n, d = values.shape
        fewest, rank = (min(max(1, size // (4 * d)), d) for size in (least, most))
        if fewest < min(rank, n):
            sample = values[:: -(-n // _SAMPLE)]
            judges = torch.arange(len(sample)) % _JUDGES == 0
            if judges.sum() > 2:
                scores = _Spectrum(sample[~judges], rank).scores(sample[judges])
                rank = max(fewest, _fewest(scores, agreement))
        spectrum = _Spectrum(values, rank)
        rank = spectrum.directions.shape[1]
        return cls(
            mean=spectrum.mean,
            directions=spectrum.directions.float(),
            weights=spectrum.weights,
            rest=spectrum.rest[-1] if rank < d else torch.zeros_like(spectrum.rest[-1]),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``, in the dtype of the rows."""
        centred = rows - self.mean
        along = [centred @ self.directions[:, :_EXACT].to(rows.dtype)]
        if self.directions.shape[1] > _EXACT:
            others = self.directions[:, _EXACT:]
            along.append((centred.to(others.dtype) @ others).to(rows.dtype))
        squares = torch.cat(along, 1).square()
        outside = (centred.square().sum(-1) - squares.sum(-1)).clamp(min=0)
        return squares @ self.weights + self.rest * outside


class _Spectrum:
    """Everything that a distance with up to ``rank`` directions needs, from ``rows`` ``(n, d)``.

    ``rest[r - 1]`` is the weight outside the first r directions.
    """

    def __init__(self, rows: Tensor, rank: int) -> None:
        d = rows.shape[1]
        self.mean = rows.mean(0)
        centred = rows - self.mean
        values, self.directions = principal(centred, rank)
        rho, average = shrinkage(values, centred)
        # Where nothing varies, any scale does.
        floor = max(rho * average, 1e-10 * float(values[0])) or 1.0
        kept = self.directions.shape[1]
        left_out = (d - torch.arange(1, kept + 1)).clamp(min=1)
        outside = (d * average - values[:kept].cumsum(0)).clamp(min=0) / left_out
        self.weights = 1 / ((1 - rho) * values[:kept] + floor)
        self.rest = 1 / ((1 - rho) * outside + floor)

    def scores(self, rows: Tensor) -> Tensor:
        """Scores ``(B, r)`` of ``rows`` ``(B, d)`` with the first 1 to r directions."""
        centred = rows - self.mean
        squares = (centred @ self.directions).square()
        outside = centred.square().sum(1, keepdim=True) - squares.cumsum(1)
        return (squares * self.weights).cumsum(1) + self.rest * outside.clamp(min=0)


def _fewest(scores: Tensor, agreement: float) -> int:
    """The number of directions from which on ``scores`` ``(B, r)`` order the rows like those in the last column."""
    ranks = scores.argsort(0).argsort(0).double()
    ranks = ranks - ranks.mean(0)
    correlation = (ranks * ranks[:, -1:]).sum(0) / ranks[:, -1].square().sum()
    short = torch.nonzero(correlation < agreement)
    return int(short[-1]) + 2 if len(short) else 1
