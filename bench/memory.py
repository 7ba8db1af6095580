"""Peak memory of one call, beyond what was allocated before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.profiler._utils import traverse_dfs


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Return the bytes that the framework's allocator held at most during the call, less those it held before.

    On a GPU from ``torch.cuda.max_memory_allocated``, on a CPU from the profiler's record of every allocation. Scratch
    that a C library allocates by itself is in neither.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = traverse_dfs(trace.profiler.kineto_results.experimental_event_tree())
    allocations = [event for event in events if event.tag.name == "Allocation"]
    held: dict[int, int] = {}
    live = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        pointer, size = event.typed[1].ptr, event.typed[1].alloc_size
        if size > 0:
            held[pointer] = size
            live += size
        else:  # blocks older than the call do not count
            live -= held.pop(pointer, 0)
        peak = max(peak, live)
    return peak
