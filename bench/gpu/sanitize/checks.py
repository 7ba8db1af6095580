"""The checks of a case, and all of them in a row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import interpreter_builder

from bench.gpu.compile_cases import Case, as_if_on
from bench.gpu.sanitize.cases import cases, huge
from bench.gpu.sanitize.watchers import Addresses, Memory, SanitizerError, watching
from fastgrad.ops import tune

Order = Callable[[int], Sequence[int]]


def shuffled(count: int) -> list[Order]:
    return [lambda n, seed=seed: Random(seed).sample(range(n), n) for seed in range(count)]  # type: ignore[misc]


def check_memory(case: Case, orders: Iterable[Order] = (range, lambda n: range(n)[::-1])) -> int:
    """Check every memory operation of a case, and that its results have equal bits in all orders of its programs.

    Return how many orders were run; a fault is a `SanitizerError` with the kernel's name.
    """
    expected, count = None, 0
    for count, order in enumerate(orders, 1):  # noqa: B007
        memory = Memory(case.inputs, order)
        with watching(memory), memory.allocating():
            result = case.call()
        found = torch.cat([t.flatten() for t in (result if isinstance(result, tuple) else (result,))])
        if found.isnan().any():
            raise SanitizerError(f"{case.name}: a result was not written")
        bits = found.view(torch.int32)
        expected = bits if expected is None else expected
        if not torch.equal(bits, expected):
            raise SanitizerError(f"{case.name}: the order of programs changes the result")
    return count


def check_addresses(call: Callable[[], object], architecture: tune.Architecture, integer: int = 1) -> int:
    """Run a launcher on meta tensors, configured as for an architecture; return how many addresses were checked.

    ``integer`` is the value of all integers in memory: flags, class indices. An address outside every operand is a
    `SanitizerError`; arithmetic that leaves 32 bits is the interpreter's own error.
    """
    watcher = Addresses(integer)
    # The interpreter then refuses every sum and product of integers that leaves 32 bits.
    options = dataclasses.replace(interpreter_builder.options, debug=True)
    with as_if_on(architecture), watching(watcher), mock.patch.object(interpreter_builder, "options", options):
        call()
    return watcher.count


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], int]]]:
    for case in cases():
        if case.quick or not quick:
            orders = [range, lambda n: range(n)[::-1], *shuffled(1 if quick else 2)]
            yield f"memory: {case.name}", partial(check_memory, case, orders)
    for arch in ("sm_90",) if quick else tune.KNOWN_ARCHITECTURES:
        for name, call, integer in huge():
            if not quick or "beyond" in name:
                check = partial(check_addresses, call, tune.KNOWN_ARCHITECTURES[arch], integer)
                yield f"offsets on {arch}: {name}", check


def run(quick: bool, only: str) -> list[dict[str, Any]]:
    """Run all checks whose name contains ``only``; return a row for each.

    ``count`` is the number of orders that ran, or of addresses that were computed.
    """
    rows: list[dict[str, Any]] = []
    for name, job in jobs(quick):
        if only in name:
            begun, outcome, fault = time.perf_counter(), None, None
            try:
                outcome = job()
            except Exception as problem:  # the other cases still run
                fault = str(problem)
            seconds = round(time.perf_counter() - begun, 1)
            check, _, case = name.partition(": ")
            rows.append({"check": check, "case": case, "count": outcome, "fault": fault, "seconds": seconds})
            print(f"FAULT {name}: {fault}" if fault else f"{name}: right ({outcome}), {seconds} s", flush=True)
    return rows
