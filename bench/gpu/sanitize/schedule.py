"""Programs that stop between any two of their memory operations, in every order that could make a difference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from torch import Tensor

from bench.gpu.sanitize.interpreter import Watcher, watching


@dataclass(frozen=True)
class Operation:
    """A memory operation: the launch of the call, the places ``(operand, byte)`` and whether it writes."""

    launch: int
    places: frozenset[tuple[int, int]]
    writes: bool


def dependent(one: Operation, other: Operation) -> bool:
    """Whether the order of two operations could matter."""
    return (
        one.launch == other.launch
        and (one.writes or other.writes)
        and not one.places.isdisjoint(other.places)
    )


class Scheduled(Watcher):
    """Runs the programs of a launch in turns, each as far as its next operation on memory that programs share.

    Args:
        inputs: Tensors that no kernel writes: reading them never matters.
        pick: From what each program would do next to the program that does it.
    """

    def __init__(self, inputs: Sequence[Tensor], pick: Callable[[dict[int, Operation]], int]) -> None:
        self.pick = pick
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        #: Storages in the order in which launches name them: the same in every run, where addresses are not.
        self.storages: dict[int, Any] = {}
        self.launches = 0
        self.local = threading.local()

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        """Number the operands of a launch."""
        self.launches += 1
        for tensor in arguments.values():
            if isinstance(tensor, Tensor):
                self.storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        self.bases = list(self.storages)
        self.sorted = np.array(sorted(self.bases))
        return range(programs)

    def run(self, programs: Sequence[int], body: Callable[[], None], select: Callable[[int], None]) -> None:
        """Run programs in turns."""
        waiting: dict[int, Operation] = {}
        turn = {program: threading.Semaphore(0) for program in programs}
        parked = threading.Semaphore(0)
        problems: list[BaseException] = []

        def stop(operation: Operation) -> None:
            program = self.local.program
            waiting[program] = operation
            parked.release()
            turn[program].acquire()
            if problems:
                raise SystemExit
            select(program)

        def work(program: int) -> None:
            self.local.program, self.local.stop = program, stop
            turn[program].acquire()
            try:
                if not problems:
                    select(program)
                    with np.errstate(all="ignore"):
                        body()
            except SystemExit:
                pass
            except BaseException as problem:
                problems.append(problem)
            parked.release()

        threads = [threading.Thread(target=work, args=(program,), daemon=True) for program in programs]
        for thread in threads:
            thread.start()
        for program in programs:  # as far as the first operation
            turn[program].release()
            parked.acquire()
        while waiting and not problems:
            program = self.pick(waiting)
            del waiting[program]
            turn[program].release()
            parked.acquire()
        for program in programs:
            turn[program].release()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]

    def load(self, addresses: np.ndarray, width: int) -> None:
        """Stop before a read."""
        self._stop(addresses, False)

    def store(self, addresses: np.ndarray, width: int) -> bool:
        """Stop before a write."""
        self._stop(addresses, True)
        return False

    def atomic(self, addresses: np.ndarray, ordered: bool) -> None:
        """Stop before an atomic operation."""
        self._stop(addresses, True)

    def _stop(self, addresses: np.ndarray, writes: bool) -> None:
        if not addresses.size:
            return
        base = int(self.sorted[np.searchsorted(self.sorted, np.int64(addresses.flat[0]), "right") - 1])
        if writes or base not in self.inputs:
            operand = self.bases.index(base)
            places = frozenset((operand, int(address) - base) for address in addresses.flat)
            self.local.stop(Operation(self.launches, places, writes))


def randomly(seed: int) -> Callable[[dict[int, Operation]], int]:
    """A pick that prefers nobody, or, every other seed, lets a program run on for a while."""
    random, last = Random(seed), [-1]

    def pick(waiting: dict[int, Operation]) -> int:
        if seed % 2 and last[0] in waiting and random.random() < 0.9:
            return last[0]
        last[0] = random.choice(sorted(waiting))
        return last[0]

    return pick


@dataclass
class _Choice:
    """One step of an execution: what could run, what has been tried, what need not be."""

    waiting: dict[int, Operation]
    chosen: int
    todo: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    asleep: dict[int, Operation] = field(default_factory=dict)


class Exhaustive:
    """All executions that differ in the order of dependent operations, by dynamic partial-order reduction.

    Iterate over it and let each item's ``pick`` steer one execution. Two operations of different programs that depend
    on each other and that nothing else orders are run in the other order as well; orders of independent operations are
    never told apart. Programs must act alike whenever they read alike.
    """

    def __init__(self) -> None:
        self.path: list[_Choice] = []

    def __iter__(self) -> Iterator[Callable[[dict[int, Operation]], int]]:
        while True:
            self.step = 0
            yield self._pick
            del self.path[self.step :]
            self._find_races()
            while self.path:
                last = self.path[-1]
                last.done.add(last.chosen)
                last.asleep[last.chosen] = last.waiting[last.chosen]
                rest = last.todo - last.done - set(last.asleep)
                if rest:
                    last.chosen = min(rest)
                    break
                self.path.pop()
            if not self.path:
                return

    def _pick(self, waiting: dict[int, Operation]) -> int:
        if self.step == len(self.path):
            asleep: dict[int, Operation] = {}
            if self.path:
                before = self.path[-1]
                taken = before.waiting[before.chosen]
                asleep = {
                    p: op
                    for p, op in before.asleep.items()
                    if p != before.chosen and not dependent(op, taken)
                }
            awake = sorted(set(waiting) - set(asleep))
            # With all asleep this execution equals one before it; it still runs to its end.
            chosen = awake[0] if awake else min(waiting)
            self.path.append(_Choice(dict(waiting), chosen, {chosen}, set(), asleep))
        choice = self.path[self.step]
        self.step += 1
        return choice.chosen

    def _find_races(self) -> None:
        """Mark where a later operation of another program should be tried first."""
        clocks: dict[int, dict[int, int]] = {}
        events: list[tuple[int, Operation, dict[int, int]]] = []
        for i, choice in enumerate(self.path):
            program, operation = choice.chosen, choice.waiting[choice.chosen]
            known = dict(clocks.get(program, {}))
            clock = dict(known)
            for j, (other, earlier, its) in enumerate(events):
                if other != program and dependent(earlier, operation):
                    if known.get(other, -1) < j:
                        before = self.path[j]
                        before.todo |= {program} if program in before.waiting else set(before.waiting)
                    for p, n in its.items():
                        clock[p] = max(clock.get(p, -1), n)
            clock[program] = i
            clocks[program] = clock
            events.append((program, operation, clock))


def outcomes(
    call: Callable[[], Any], inputs: Sequence[Tensor], limit: int = 0, seed: int = 0
) -> Iterator[Any]:
    """What a call returns under all schedules that could differ, or under ``limit`` random ones."""
    picks = (randomly(seed + i) for i in range(limit)) if limit else iter(Exhaustive())
    for pick in picks:
        with watching(Scheduled(inputs, pick)):
            result = call()
        yield result
