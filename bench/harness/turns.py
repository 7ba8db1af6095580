"""Processor time of calls that take turns: what else runs does not count, and a slow minute hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, after a first one, which plans and warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - start)
    return taken
