"""Temperature: the number that logits are divided by to calibrate their softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrad.scores.fitted import Fitted

#: Largest temperature; its inverse is the smallest.
_WIDEST = 1e3


class Temperature(Fitted):
    """Logits divided by one number, ``z / T``, which keeps the predicted class.

    Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017. The inverse temperature b
    minimises ``sum_i NLL(b z_i, y_i) + b - 1 - log b``, which is convex in b. The last terms, a Gamma prior with its
    mode at b = 1, weigh about as much as one sample. Without them, b would be infinite if every sample is classified
    correctly, and 0 if the logits carry no information. T is kept within 1/1000 and 1000.
    """

    temperature: Tensor  # ()

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor) -> Temperature:
        """Fit on ``logits`` ``(n, N)`` and class indices ``(n,)`` of samples that the network was not trained on."""
        z = logits.detach().double()
        # A class that is masked out has probability 0 at any temperature.
        finite = z.masked_fill(z == -torch.inf, 0)
        own = finite.gather(1, labels.to(z.device).long().unsqueeze(1)).sum()

        def slope(inverse: float) -> float:
            """Return the derivative of the objective, which increases with ``inverse``."""
            expected = (torch.softmax(inverse * z, 1) * finite).sum()
            return float(expected - own) + 1 - 1 / inverse

        low, high = -math.log(_WIDEST), math.log(_WIDEST)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
        return cls(temperature=torch.tensor(math.exp(-(low + high) / 2), dtype=torch.float64, device="cpu"))

    def forward(self, logits: Tensor) -> Tensor:
        """Return the calibrated ``logits`` ``(B, N)``, in their dtype."""
        return logits / self.temperature.to(logits.dtype)
