"""What the logits alone say: energy and margin."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.scores.fitted import Fitted


class Energy(Fitted):
    """Minus the log-sum-exp of the logits: ``s(z) = -log sum_j exp(z_j)``.

    Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection", 2020.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``logits`` ``(B, N)``."""
        return -torch.logsumexp(logits, -1)


class Margin(Fitted):
    """Minus the distance between the two highest logits: ``s(z) = z_(2) - z_(1)``.

    Scheffer, Decomain and Wrobel, "Active hidden Markov models for information extraction", 2001, on
    probabilities; on logits it does not saturate.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of the two highest ``logits`` ``(B, 2)``, in falling order."""
        return logits[:, 1] - logits[:, 0]
