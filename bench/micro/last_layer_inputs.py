"""The inputs of the last layer's tasks, and what float64 makes of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Place, relative_error

Shape = tuple[int, int, int]


class Head:
    """Seeded features, weights and logits of spread 3, in the dtype of the case, and what float64 makes of them."""

    def __init__(self, shape: Shape, dtype: str, place: Place) -> None:
        B, N, D = shape
        device = place.device
        made = torch.Generator(device).manual_seed(place.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=made, device=device)

        self.shape, self.dtype = shape, getattr(torch, dtype)
        self.h = normal(B, D).to(self.dtype)
        self.weight = (normal(N, D) * 3 / D**0.5).to(self.dtype)
        self.bias = normal(N).to(self.dtype)
        self.z = F.linear(self.h, self.weight, self.bias)

    def factor(self) -> Tensor:
        """``||h||^2 + 1`` in float64, ``(B, 1)``."""
        return self.h.double().square().sum(-1, keepdim=True) + 1

    def norms(self, logits: Tensor) -> Tensor:
        """All contrasts' squared norms in float64, by leave-one-out sums."""
        p = logits.double().softmax(-1)
        top = p.argmax(-1, keepdim=True)
        rest = p.scatter(-1, top, 0.0)
        s1, s2 = rest.sum(-1, keepdim=True), rest.square().sum(-1, keepdim=True)
        # 1 - p_k keeps its digits in float64 for every k but the largest.
        norms = (1 - rest).square() + (p.square().sum(-1, keepdim=True) - rest.square())
        return norms.scatter(-1, top, s1.square() + s2) * self.factor()

    def error(self, found: Tensor) -> float:
        """Relative error of all contrasts for the case's own logits."""
        return relative_error(found, self.norms(self.z))
