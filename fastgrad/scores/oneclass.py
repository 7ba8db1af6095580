"""One-class scores: how far a sample lies from clean data, higher is less usual, as traceable modules."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .fitted import Fitted

Array = NDArray[np.float64]


def _tensor(values: object) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values, dtype=np.float64))


class GaussianMixture(Fitted):
    """Minus the log density of a mixture of Gaussians with full covariances."""

    means: Tensor
    factors: Tensor
    constants: Tensor

    @classmethod
    def fit(cls, rows: Array, components: int, regularization: float, seed: int) -> GaussianMixture:
        """From ``rows`` ``(n, d)``; ``regularization`` is added to every variance."""
        from sklearn.mixture import GaussianMixture as Mixture

        mixture = Mixture(components, reg_covar=regularization, random_state=seed, max_iter=200, tol=1e-3)
        mixture.fit(rows)
        factors = _tensor(mixture.precisions_cholesky_)
        log_determinant = torch.diagonal(factors, dim1=1, dim2=2).log().sum(1)
        constants = (
            _tensor(np.log(mixture.weights_)) + log_determinant - 0.5 * rows.shape[1] * math.log(2 * math.pi)
        )
        means = _tensor(mixture.means_)
        return cls(means=means, factors=factors, constants=constants)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``."""
        centred = rows.unsqueeze(0) - self.means.unsqueeze(1)
        distance = torch.bmm(centred, self.factors).square().sum(-1)
        return -torch.logsumexp(self.constants.unsqueeze(1) - 0.5 * distance, 0)


class Mahalanobis(Fitted):
    """Squared Mahalanobis distance to the mean, with a shrunk covariance (Ledoit and Wolf, 2004)."""

    mean: Tensor
    whitening: Tensor

    @classmethod
    def fit(cls, rows: Array) -> Mahalanobis:
        """From ``rows`` ``(n, d)``."""
        from sklearn.covariance import ledoit_wolf

        covariance, _ = ledoit_wolf(rows)
        values, vectors = np.linalg.eigh(covariance)
        floor = max(float(values[-1]), 1e-300) * 1e-10
        return cls(
            mean=_tensor(rows.mean(0)), whitening=_tensor(vectors / np.sqrt(np.maximum(values, floor)))
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``."""
        return ((rows - self.mean) @ self.whitening).square().sum(-1)


class NearestNeighbours(Fitted):
    """Distance to the k-th nearest clean sample (Sun et al., 2022)."""

    bank: Tensor

    @classmethod
    def fit(cls, rows: Array, neighbours: int) -> NearestNeighbours:
        """From ``rows`` ``(n, d)``; ``neighbours`` at most n."""
        return cls(bank=_tensor(rows), neighbours=min(neighbours, len(rows)))

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``."""
        squares = rows.square().sum(-1, keepdim=True) + self.bank.square().sum(-1)
        distance = (squares - 2 * rows @ self.bank.T).clamp(min=0)
        nearest = torch.topk(distance, self.options["neighbours"], dim=-1, largest=False).values
        return nearest[:, -1].sqrt()


class Energy(Fitted):
    """Minus the log-sum-exp of the logits (Liu et al., 2020)."""

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``logits`` ``(B, N)``."""
        return -torch.logsumexp(logits, -1)


class Margin(Fitted):
    """Minus the distance between the two highest logits."""

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of the two highest ``logits`` ``(B, 2)``, in falling order."""
        return logits[:, 1] - logits[:, 0]
