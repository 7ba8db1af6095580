"""Density of a Gaussian mixture."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastgrad import checks
from fastgrad.scores.fitted import Fitted, as_buffer


class GaussianMixture(Fitted):
    """Minus the log density of a mixture of Gaussians with full covariances.

    ``s(x) = -log sum_k pi_k N(x; mu_k, S_k)``, fitted by expectation maximisation (Dempster, Laird and Rubin,
    "Maximum likelihood from incomplete data via the EM algorithm", 1977).
    """

    means: Tensor
    factors: Tensor
    constants: Tensor

    @classmethod
    def fit(cls, rows: Tensor, components: int) -> GaussianMixture:
        """Fit on ``rows`` ``(n, d)`` of unit variance; a hundredth is added to every variance."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Mixture

        mixture = Mixture(components, reg_covar=1e-2, random_state=0, max_iter=200, tol=1e-3)
        # Raised for equal rows, or if more iterations would help; the result is a density in any case.
        with checks.without_warnings(ConvergenceWarning):
            mixture.fit(rows.numpy())
        factors = as_buffer(mixture.precisions_cholesky_)
        log_determinant = torch.diagonal(factors, dim1=1, dim2=2).log().sum(1)
        constants = as_buffer(np.log(mixture.weights_)) + log_determinant - 0.5 * rows.shape[1] * math.log(2 * math.pi)
        return cls(means=as_buffer(mixture.means_), factors=factors, constants=constants)

    def forward(self, rows: Tensor) -> Tensor:
        """Return scores ``(B,)`` of ``rows`` ``(B, d)``."""
        centred = rows.unsqueeze(0) - self.means.unsqueeze(1)
        distance = torch.bmm(centred, self.factors).square().sum(-1)
        return -torch.logsumexp(self.constants.unsqueeze(1) - 0.5 * distance, 0)
