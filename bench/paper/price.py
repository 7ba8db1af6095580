"""What a method costs: processor time, in forward passes of the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def prices(
    model: nn.Module, x: Tensor, calls: Mapping[str, Callable[[], object]], rounds: int = 4
) -> dict[str, float]:
    """The least processor time of each call over that of ``model(x)``, all taken in turn."""

    def plain() -> None:
        with torch.no_grad():
            model(x)

    every = {"": plain, **calls}
    taken: dict[str, list[float]] = {name: [] for name in every}
    # The first round warms up: what is planned at the first call is no part of the price.
    for turn in range(rounds + 1):
        for name, call in every.items():
            start = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - start)
    least = {name: min(values) for name, values in taken.items()}
    return {name: least[name] / least[""] for name in calls}
