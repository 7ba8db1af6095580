"""Temperature scaling: one number that makes probabilities as likely as they say."""

from __future__ import annotations

import torch
from torch import Tensor

from .fitted import Fitted


class Temperature(Fitted):
    """Logits divided by a temperature (Guo et al., "On calibration of modern neural networks", 2017)."""

    temperature: Tensor

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor) -> Temperature:
        """From held-out ``logits`` ``(n, N)`` and ``labels`` ``(n,)``: the temperature of least log loss."""
        z = logits.double()
        rows = torch.arange(len(z))

        def loss(log_t: float) -> float:
            return float(-(z * (2.718281828459045**-log_t)).log_softmax(-1)[rows, labels].mean())

        low, high = -2.5, 2.5
        golden = (5**0.5 - 1) / 2
        for _ in range(60):
            a, b = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, b) if loss(a) < loss(b) else (a, high)
        return cls(temperature=torch.tensor((low + high) / 2, dtype=torch.float64).exp())

    def forward(self, logits: Tensor) -> Tensor:
        """Logits ``(B, N)``."""
        return logits / self.temperature.to(logits.dtype)
