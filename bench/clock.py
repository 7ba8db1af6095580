"""What pytest-benchmark cannot do: calls in turns, a GPU's time, peak memory, and the machine's best rates."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from timeit import repeat
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.profiler._utils import traverse_dfs

Call = Callable[[], Any]


def seconds(call: Call, calls: int, clock: Callable[[], float] = time.process_time) -> float:
    """Return the mean time of one of ``calls`` calls; processor time leaves out other processes."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def in_turns(measures: Sequence[Callable[[int], float]], rounds: int, least: float = 0.0) -> list[list[float]]:
    """Return for each measure the seconds of a call in every round: a slow minute of the machine hits all measures.

    A measure takes a number of calls, which last at least ``least`` seconds together, and returns the seconds of one.
    Every other round runs the measures in reverse order.
    """
    # The first calls check the network and warm up.
    once = min(measure(1) for measure in (*measures, *measures))
    calls = max(1, min(1000, int(least / max(once, 1e-7))))
    taken: list[list[float]] = [[] for _ in measures]
    for turn in range(rounds):
        for place in range(len(measures))[:: -1 if turn % 2 else 1]:
            taken[place].append(measures[place](calls))
    return taken


def rounded_ratio(taken: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Return the columns ``ratio`` (the median) and ``quartiles`` of a row, from the ratios round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(taken, base, strict=True)], n=4)
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def deciles(times: Sequence[float]) -> dict[str, float]:
    """Return the columns ``median_s``, ``p10_s`` and ``p90_s`` of a row."""
    cut = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [*times] * 9
    return {"median_s": cut[4], "p10_s": cut[0], "p90_s": cut[8]}


def timed(call: Call, device: str, graph: bool = False, calls: int = 9) -> list[float]:
    """Return the seconds of each of several calls: on a CPU ``calls``, on a GPU as many as fit half a second.

    A GPU's cache is overwritten before each call, which also hides the launch from the host. With ``graph``, the call's
    replay as a CUDA graph is timed.
    """
    if device == "cpu":
        return repeat(call, number=1, repeat=calls)
    from triton.testing import do_bench

    return [1e-3 * t for t in do_bench(graphed(call) if graph else call, rep=500, return_mode="all")]


def latency(call: Call) -> float:
    """Return the median seconds from a call until an idle GPU has done its work: Python and the launches included."""

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    finished()
    (once,) = repeat(finished, number=1, repeat=1)
    return statistics.median(repeat(finished, number=1, repeat=max(3, min(50, int(0.5 / once)))))


def graphed(call: Call) -> Call:
    """Return the replay of a call as a CUDA graph; the call itself if it cannot be captured."""
    try:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
    except RuntimeError as problem:
        print(f"  not captured in a graph: {str(problem).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return call
    return graph.replay


def peak_bytes(call: Call, device: str) -> int:
    """Return the bytes that the framework's allocator held at most during the call, less those it held before.

    On a CPU they come from the profiler's record of all allocations, which lacks scratch that a C library allocates.
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
    held: dict[int, int] = {}
    peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag.name == "Allocation":
            pointer, size = event.typed[1].ptr, event.typed[1].alloc_size
            if size > 0:
                held[pointer] = size
                peak = max(peak, sum(held.values()))
            else:  # blocks older than the call do not count
                held.pop(pointer, None)
    return peak


def floor(device: str) -> dict[str, Any]:
    """Measure a large copy, a large product in every dtype of the device, and the smallest call, each at its fastest.

    The copy counts bytes read plus bytes written, the product floating-point operations.
    """
    source = torch.ones(1 << (26 if device == "cpu" else 29), device=device)
    target, one = torch.zeros_like(source), torch.zeros(1, device=device)
    copied = 2 * source.nbytes / min(timed(lambda: target.copy_(source), device))
    edge = 1024 if device == "cpu" else 8192
    rates = {}
    for name in ["float32"] if device == "cpu" else ["float32", "float16", "bfloat16"]:
        # Ones would need less power, and a GPU would clock higher.
        a = torch.randn(edge, edge, device=device).to(getattr(torch, name))
        out = a.clone()
        rates[name] = 2 * edge**3 / min(timed(partial(torch.mm, a, a, out=out), device))
    return {"copy_bytes_per_s": copied, "matrix_per_s": rates, "launch_s": min(timed(lambda: one.add_(1), device))}
