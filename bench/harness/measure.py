"""Check and time the implementations of one case, in this process."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness import memory
from bench.harness.case import Case, Implementation, Result
from bench.harness.clock import Clock, clock

#: Runs of one implementation, at least and at most.
FEWEST, MOST = 5, 200


def run_case(case: Case, device: str = "cpu", budget_s: float = 4.0) -> list[Result]:
    """Check and time every implementation of a case.

    Args:
        case: The case.
        device: ``"cpu"`` or ``"cuda"``.
        budget_s: Seconds for timing all implementations together; each gets ``FEWEST`` runs at least, and three if
            one run alone takes longer than the budget.

    Returns:
        One result an implementation.
    """
    results: list[Result] = []
    ready: list[tuple[Result, Callable[[], Any]]] = []
    for item in case.implementations():
        result = Result(case.name, item.name, case.relative_to, False)
        results.append(result)
        call = gate(item, result)
        if call is not None:
            ready.append((result, call if device == "cpu" or not item.graph else graphed(call)))
    take_turns(ready, clock(device), budget_s)
    for result, call in ready:
        result.peak_bytes = memory.peak_bytes(call, device)
    gc.collect()
    return results


def gate(item: Implementation, result: Result) -> Callable[[], Any] | None:
    """The prepared call if its result is right, else None and the reason in ``result``."""
    try:
        call = item.prepare()
        error = float(item.check(call()))
    except Exception as problem:  # a peer may refuse a task in any way it likes
        result.note = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        print(f"  {result.case}: {item.name} does not run: {result.note}", file=sys.stderr)
        return None
    result.error = error
    result.correct = error <= item.tolerance
    if not result.correct:
        result.note = f"relative error {error:.1e}, allowed {item.tolerance:.1e}"
        print(f"  {result.case}: {item.name} is not timed: {result.note}", file=sys.stderr)
        return None
    return call


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of the call as a CUDA graph; the call itself where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as problem:
        print(f"  not captured in a graph: {str(problem).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return call

    def replay(held: torch.cuda.CUDAGraph = graph) -> None:
        held.replay()

    replay.plain = call  # type: ignore[attr-defined]
    return replay


def take_turns(ready: Sequence[tuple[Result, Any]], measure: Clock, budget_s: float) -> None:
    """Time calls in turns until the budget is spent; ``measure`` knows how to run them."""
    if not ready:
        return
    share = budget_s / len(ready)
    wanted: list[int] = []
    repeats: list[int] = []
    for result, call in ready:
        once = measure(call, 1)
        inner = measure.repeats(once)
        repeats.append(inner)
        runs = int(share / max(once * inner, 1e-9))
        if once > share:
            # Seconds a call: this run counts, two more follow.
            result.times.append(once)
            wanted.append(2)
        else:
            wanted.append(max(FEWEST, min(MOST, runs)))
    start = time.perf_counter()
    # Spread the turns of each evenly over the longest series.
    rounds = max(wanted)
    for turn in range(rounds):
        for (result, call), runs, inner in zip(ready, wanted, repeats, strict=True):
            if (turn * runs) // rounds != ((turn + 1) * runs) // rounds:
                result.times.append(measure(call, inner))
        if time.perf_counter() - start > 3 * budget_s and all(len(r.times) >= 3 for r, _ in ready):
            break
