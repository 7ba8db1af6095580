"""What a method costs: processor time, in forward passes of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bench.clock import in_turns


def prices(
    model: nn.Module, x: Tensor, calls: Mapping[str, Callable[[], object]], rounds: int = 4
) -> dict[str, float]:
    """The least processor time of each call over that of ``model(x)``, all taken in turn."""

    def plain() -> None:
        with torch.no_grad():
            model(x)

    least = {name: min(values) for name, values in in_turns({"": plain, **calls}, rounds).items()}
    return {name: least[name] / least[""] for name in calls}
