"""How long a call takes: wall time on a CPU, CUDA events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

#: A sample lasts at least this long on a CPU, or the clock's own cost would show.
SAMPLE_S = 1e-3


class Clock(Protocol):
    """Seconds per call, from a number of calls in a row."""

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        """Time ``calls`` calls; returns seconds per call."""
        ...

    def repeats(self, once: float) -> int:
        """Calls per sample if one takes ``once`` seconds."""
        ...


class WallClock:
    """``time.perf_counter`` around the calls."""

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        """See `Clock`."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def repeats(self, once: float) -> int:
        """See `Clock`."""
        return max(1, min(1000, int(SAMPLE_S / max(once, 1e-7))))


class EventClock:
    """CUDA events around each call; the cache is overwritten first, which also hides the launch from the host."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(4 * size, 1 << 28), dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        """See `Clock`."""
        pairs = []
        for _ in range(calls):
            self.flush.zero_()
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in pairs) * 1e-3 / calls

    def repeats(self, once: float) -> int:
        """See `Clock`."""
        return 1


def clock(device: str) -> Clock:
    """The clock of a device."""
    return EventClock() if device == "cuda" else WallClock()
