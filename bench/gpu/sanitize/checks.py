"""The checks of a case, and all of them in a row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from bench.gpu.sanitize import offsets, schedule
from bench.gpu.sanitize.cases import HEADS, Case, cases, huge, made, pinned
from bench.gpu.sanitize.interpreter import Watcher, watching
from bench.gpu.sanitize.memory import Memory, SanitizerError
from fastgrad.ops import tune
from fastgrad.ops.triton import linear_contrast

#: Shuffled orders of the programs, beside the usual one and its reverse.
SHUFFLED = 2


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As a tuple."""
    return result if isinstance(result, tuple) else (result,)


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether all bits are, and no poison is left."""
    return all(
        bool((a.view(torch.int32) == b.view(torch.int32)).all()) and not bool(a.isnan().any())
        for a, b in zip(one, other, strict=True)
    )


def check_memory(case: Case, shuffled: int = SHUFFLED) -> None:
    """Every address, initialisation and race of a case, and equal bits in several orders of its programs.

    Raises:
        SanitizerError: What is wrong, with the kernel's name.
    """
    with watching(Watcher()):
        expected = outputs(case.call())
    before = [torch.frombuffer(bytearray(t.untyped_storage()), dtype=torch.uint8) for t in case.inputs]
    orders: list[Callable[[int], list[int]]] = [
        lambda n: list(range(n)),
        lambda n: list(reversed(range(n))),
        *(lambda n, seed=seed: Random(seed).sample(range(n), n) for seed in range(shuffled)),
    ]
    for order in orders:
        memory = Memory(case.inputs, order)
        with watching(memory), memory.allocating():
            result = outputs(case.call())
        if not memory.operations:
            raise SanitizerError(f"{case.name}: no memory operation was seen")
        if not equal(result, expected):
            raise SanitizerError(f"{case.name}: the order of programs changes the result")
    for tensor, bits in zip(case.inputs, before, strict=True):
        if not torch.equal(torch.frombuffer(bytearray(tensor.untyped_storage()), dtype=torch.uint8), bits):
            raise SanitizerError(f"{case.name}: an input or its margin was changed")


def check_schedules(case: Case, limit: int = 0) -> int:
    """Equal bits under all schedules, or ``limit`` random ones; returns how many were run."""
    with watching(Watcher()):
        expected = outputs(case.call())
    count = 0
    for result in schedule.outcomes(case.call, case.inputs, limit):
        count += 1
        if not equal(outputs(result), expected):
            raise SanitizerError(f"{case.name}: schedule {count} changes the result")
    return count


def scheduled(programs: int, quick: bool = False) -> Iterator[Case]:
    """Return the reductions that the last program to arrive finishes, with so many programs a row block."""
    N, D = 16 * programs, 3
    x, w, b = made(2, D), made(N, D, seed=1), made(N, seed=2)
    one = dataclasses.replace(HEADS["last"], group_m=1, tiles_per_split=1)
    for loss in ("cross_entropy",) if quick else ("cross_entropy", "bce", "brier"):
        call = pinned(
            linear_contrast.linear_contrast_sqnorm, x, w, b, loss, False, False, linear_contrast=one
        )
        yield Case(f"head, {programs} programs, {loss}", (x, w, b), call)
        call = pinned(linear_contrast.linear_contrast_stats, x, w, b, loss, False, linear_stats=one)
        yield Case(f"statistics, {programs} programs, {loss}", (x, w, b), call)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return every check by name."""
    for case in cases():
        if case.quick or not quick:
            yield f"memory: {case.name}", partial(check_memory, case, 1 if quick else SHUFFLED)
    for programs in (2,) if quick else (2, 3, 4):
        for case in scheduled(programs, quick):
            if "brier" not in case.name or programs < 4:
                yield f"all schedules: {case.name}", partial(check_schedules, case)
    for case in scheduled(6 if quick else 24, quick):
        yield f"random schedules: {case.name}", partial(check_schedules, case, 3 if quick else 30)
    for arch in ("sm_90",) if quick else tune.KNOWN_ARCHITECTURES:
        for name, call, integer in huge():
            if not quick or "beyond" in name:
                check = partial(offsets.check, call, tune.KNOWN_ARCHITECTURES[arch], integer)
                yield f"offsets on {arch}: {name}", check


def run(quick: bool, only: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run all checks whose name contains ``only``; return a row for each.

    Its count is of the schedules that ran, or of the addresses that were computed.
    """
    rows: list[dict[str, Any]] = []
    for name, job in jobs(quick):
        if only in name:
            begun, outcome, fault = time.perf_counter(), None, None
            try:
                outcome = job()
            except Exception as problem:  # the other cases are still worth a look
                fault = str(problem)
            seconds = round(time.perf_counter() - begun, 1)
            check, _, case = name.partition(": ")
            rows.append({"check": check, "case": case, "count": outcome, "fault": fault, "seconds": seconds})
            of = "" if outcome is None else f" ({outcome})"
            say(f"FAULT {name}: {fault}" if fault else f"{name}: right{of}, {seconds} s")
    return rows
