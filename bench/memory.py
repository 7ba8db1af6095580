"""Peak memory of one call, beyond what was allocated before it, in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import registry


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
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def of_case(size: str, case: str, name: str, device: str, threads: int) -> int:
    """Return the peak of an implementation of a case, measured in a process of its own."""
    # The server that such processes come from has imported what they need, and never touches a GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory", "bench.micro.network"])
    with context.Pool(1) as pool:
        return pool.apply(_measured, (size, case, name, device, threads))


def _measured(size: str, case: str, name: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # The profiler's C++ side announces itself, and blocks older than the call.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return peak_bytes(registry.find(size, case, name).ready(name, device)[0], device)
