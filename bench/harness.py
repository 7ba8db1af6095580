"""Measure implementations of one task side by side: first whether they are right, then how long they take.

Rules, the same for every case:

- An implementation is checked against float64 on the inputs it is timed on. One that fails, or that does not accept
  the task, is reported with ``correct: false`` and never timed.
- The implementations of a case take turns, sample by sample, so that a machine that slows down slows all of them.
  Those of whole-network cases do so in processes of their own on a CPU (see `bench.harness_isolated`).
- On a CPU a sample is wall time (``time.perf_counter``) over as many calls as fill a millisecond, with two threads
  unless asked otherwise. On a GPU it is the time between two CUDA events around one replay of a CUDA graph (one call
  where the task cannot be captured), with the second-level cache overwritten before it.
- Peak memory is what the framework's allocator held at most during one call, beyond what it held before: CUDA's
  statistics on a GPU, the profiler's record of every allocation on a CPU. Scratch that a C library allocates by
  itself is in neither.
- Copy bandwidth and matrix rate, the floors of the figures, are measured in the same run.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import harness_memory
from bench.harness_clock import Clock, clock

#: Runs of one implementation, at least and at most.
FEWEST, MOST = 5, 200


@dataclass
class Implementation:
    """One way to do a case's task.

    Attributes:
        name: As the table says it.
        prepare: Returns the call that is measured; what it does first (wrapping a model, compiling) is not.
        check: Says of the call's result whether it is right, as a relative error that must not exceed ``tolerance``.
        tolerance: Largest relative error; what is allowed and why is said where the case is made.
        graph: Whether the call can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    graph: bool = True


@dataclass
class Case:
    """One task at one size.

    Attributes:
        name: Task and sizes, e.g. ``contrasts B=256 N=1000 D=512 float32``.
        implementations: What is compared; called once, when the case runs, so that inputs exist only then.
        relative_to: The implementation that ratios refer to.
    """

    name: str
    implementations: Callable[[], list[Implementation]]
    relative_to: str


@dataclass
class Result:
    """What one implementation took in one case; times in seconds, None where it was not timed."""

    case: str
    implementation: str
    relative_to: str
    correct: bool
    error: float | None = None
    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    note: str = ""

    def quantile(self, q: float) -> float | None:
        """A quantile of the times."""
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(q)) if self.times else None


def run_case(
    case: Case, device: str = "cpu", budget_s: float = 4.0, only: Iterable[str] | None = None
) -> list[Result]:
    """Check and time every implementation of a case.

    Args:
        case: The case.
        device: ``"cpu"`` or ``"cuda"``.
        budget_s: Seconds for timing all implementations together; each gets ``FEWEST`` runs at least, and three if
            one run alone takes longer than the budget.
        only: Names to keep; None for all.

    Returns:
        One result an implementation.
    """
    results: list[Result] = []
    ready: list[tuple[Result, Callable[[], Any]]] = []
    keep = None if only is None else set(only)
    for item in case.implementations():
        if keep is not None and item.name not in keep:
            continue
        result = Result(case.name, item.name, case.relative_to, False)
        results.append(result)
        call = gate(item, result)
        if call is not None:
            ready.append((result, call if device == "cpu" or not item.graph else graphed(call)))
    take_turns(ready, clock(device), budget_s)
    for result, call in ready:
        result.peak_bytes = harness_memory.peak_bytes(call, device)
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


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest elementwise relative error; infinite where shapes differ or a value is not finite."""
    if tuple(value.shape) != tuple(reference.shape):
        return float("inf")
    value, reference = value.detach().to(reference.device).double(), reference.double()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    tiny = torch.finfo(torch.float64).tiny
    return float(((value - reference).abs() / reference.abs().clamp_min(tiny)).max())


def scaled_error(value: Tensor, reference: Tensor) -> float:
    """Largest error relative to the largest magnitude in the reference: for sums that may cancel."""
    if tuple(value.shape) != tuple(reference.shape):
        return float("inf")
    value, reference = value.detach().to(reference.device).double(), reference.double()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-300))
