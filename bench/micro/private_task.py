"""A network, a labelled batch and a norm, and how far a sum of clipped gradients may be from float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Allowed distance of the gradients, all parameters together, relative to their length: float32 through some fifty
#: layers. Opacus adds 1e-6 to every norm on purpose; vmap(grad) is off by 2e-4 on the residual network.
OURS, PEERS = 1e-4, 1e-3


class ClippedTask:
    """A network in training mode, a batch with labels, and the norm to clip to; models and inputs are seeded."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        inputs: Callable[[torch.Generator], Tensor],
        device: str,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model = build().train().to(device)
        made = torch.Generator().manual_seed(seed)
        self.x = inputs(made).to(device)
        with torch.no_grad():
            classes = self.model(self.x[:1]).shape[1]
        self.y = torch.randint(classes, (len(self.x),), generator=made).to(device)
        self.max_norm = 1.0

    def losses(self, model: nn.Module) -> Tensor:
        """``(B,)``."""
        return F.cross_entropy(model(self.x), self.y, reduction="none")

    def error(self, gradients: Sequence[Tensor]) -> float:
        """Distance from the sum of clipped gradients of a float64 loop, relative to its length."""
        return self._distance(gradients, self.max_norm)

    def step_error(self, gradients: Sequence[Tensor]) -> float:
        """Distance from the sum of gradients as they are."""
        return self._distance(gradients, float("inf"))

    def _distance(self, gradients: Sequence[Tensor], limit: float) -> float:
        model = copy.deepcopy(self.model).double()
        parameters = list(model.parameters())
        wanted = [torch.zeros_like(p) for p in parameters]
        for x, y in zip(self.x, self.y, strict=True):
            x = x.double() if x.is_floating_point() else x
            loss = F.cross_entropy(model(x[None]), y[None])
            found = torch.autograd.grad(loss, parameters)
            norm = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
            for total, g in zip(wanted, found, strict=True):
                total += min(1.0, limit / norm) * g
        pairs = list(zip(gradients, wanted, strict=True))
        off = torch.stack([(g.double() - w).square().sum() for g, w in pairs]).sum()
        distance = float((off / torch.stack([w.square().sum() for _, w in pairs]).sum()).sqrt())
        return distance if distance == distance else float("inf")
