"""Measure what an answer costs, when asked: its time over that of the plain network, on the same inputs and device.

Nothing depends on it. The fixed cost of a call weighs most for fast networks on single inputs, so these are measured
too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fastgrad.batches import as_call, batch_size, copied, logits_of, take
from fastgrad.blocks.extraction import Inputs
from fastgrad.evaluation import device_of, evaluating

#: Times that network and answer take turns.
ROUNDS = 15


@dataclass(frozen=True)
class Price:
    """Time of an answer in forward passes of the plain network, its own forward pass included.

    Attributes:
        batch: Number of inputs that were answered together.
        median: Median over rounds, for this batch.
        interval: 95 % interval of the median.
        single: Median for one input at a time.
        single_interval: Its 95 % interval.
    """

    batch: int
    median: float
    interval: tuple[float, float]
    single: float
    single_interval: tuple[float, float]

    def __str__(self) -> str:
        (low, high), (lowest, highest) = self.interval, self.single_interval
        return (
            f"{self.median:.2f} forward passes ({low:.2f} to {high:.2f}) on batches of {self.batch}, "
            f"{self.single:.2f} ({lowest:.2f} to {highest:.2f}) on single inputs"
        )


def measure(model: nn.Module, answer: Callable[[Inputs], object], x: Inputs, rounds: int = ROUNDS) -> Price:
    """Return the price of ``answer`` on the batch ``x``, on the network's device, and on its first input alone."""
    samples, first = batch_size(x), None
    if samples > 1:
        first = _ratios(model, answer, take(x, slice(0, 1), samples), rounds)
    whole = _ratios(model, answer, x, rounds)
    single = first or whole
    return Price(samples, statistics.median(whole), _interval(whole), statistics.median(single), _interval(single))


def _ratios(model: nn.Module, answer: Callable[[Inputs], object], x: Inputs, rounds: int) -> list[float]:
    def plain() -> float:
        args, kwargs = as_call(copied(x))
        return _seconds(lambda: logits_of(model(*args, **kwargs)), model)

    def answered() -> float:
        return _seconds(lambda: answer(x), model)

    with evaluating(model), torch.no_grad():
        # Watching, planning and warming up are not part of the price.
        answered(), plain()
        ratios = []
        for number in range(rounds):
            # The order alternates, because the second finds memory and caches as the first has left them.
            if number % 2:
                taken, base = answered(), plain()
            else:
                base, taken = plain(), answered()
            ratios.append(taken / base)
    return ratios


def _interval(ratios: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, from the order statistics 1.96 standard deviations of the rank around."""
    ordered, count = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = math.floor((count - 1) / 2 - reach), math.ceil((count - 1) / 2 + reach)
    return ordered[max(0, low)], ordered[min(count - 1, high)]


def _seconds(run: Callable[[], object], model: nn.Module) -> float:
    """Return the seconds of a call on the model's device; on a CPU with one thread, only the time of that thread."""
    device = device_of(model)
    # Windows counts a thread's time in steps of 16 ms, and a small network takes less than one.
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and hasattr(time, "CLOCK_THREAD_CPUTIME_ID")
    clock = time.thread_time if alone else time.perf_counter
    backend = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else backend.device(device):
        backend.synchronize(device)
        begun = clock()
        run()
        backend.synchronize(device)
        return clock() - begun
