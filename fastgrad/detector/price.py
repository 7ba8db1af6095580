"""Measure the price of a set of blocks as they will run, and find the part of the set that fits a limit.

A price is the time of an answer divided by that of the plain network, on the same inputs and device, measured in turns.
It holds for batches of the measured size: the fixed cost of a call weighs most for fast networks on single inputs. So
the price of single inputs is measured too, and printed if it exceeds the limit; leaving out a block lowers it little.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fastgrad.batches import as_call, batch_size, copied, logits_of, take
from fastgrad.blocks import Block
from fastgrad.blocks.extraction import Inputs
from fastgrad.blocks.subject import Subject
from fastgrad.evaluation import device_of, evaluating

#: In the order of AUROC gain per price: if a set is above its limit, blocks are dropped from the end. Tuned on
#: photographs with EfficientNet-Lite0 and Lite1, with an earlier form of image statistics and roughness. Without
#: roughness the mean AUROC of unseen cases fell by .008, without image statistics by .006. Contrasts, h and gradient
#: norms added nothing to these blocks.
DEFAULT_BLOCKS: tuple[str, ...] = ("logits", "activations", "image", "roughness")
#: With a second forward pass, on the enlarged centre: AUROC of attacks that went through JPEG gained .03 to .05.
EXTENDED_BLOCKS: tuple[str, ...] = (*DEFAULT_BLOCKS, "view")
#: Budget from which on a second forward pass is affordable.
EXTENDED_FROM = 2.0
#: Measuring ends at this standard error after so many rounds, or after so many seconds and at least three rounds.
ERROR, ROUNDS, SECONDS = 0.03, 7, 2.5
#: Seconds that the plain network may take for the measured inputs; larger batches are cut.
PASS = 0.1


@dataclass(frozen=True)
class PriceReport:
    """The blocks that fit a limit, and their price in forward passes, including the one that gives the logits.

    Attributes:
        blocks: Names, in the order of the preset.
        predicted: 1 plus the predicted prices of the blocks.
        measured: Price by the clock: a median over rounds.
        dropped: Names of the other blocks, each with the reason.
        limit: The largest price allowed, the budget.
        error: Standard error of ``measured``.
        batch: Batch size of the measurement.
        single: Measured price for one input at a time.
    """

    blocks: tuple[str, ...]
    predicted: float
    measured: float
    dropped: tuple[tuple[str, str], ...]
    limit: float
    error: float
    batch: int
    single: float


def fit_to_budget(
    model: nn.Module,
    blocks: Sequence[Block],
    x: Inputs,
    limit: float,
    *,
    subject: Subject,
    answer: Callable[[tuple[Block, ...]], Callable[[Inputs], object]],
) -> PriceReport:
    """Drop blocks from the end until the measured price of the others, run as ``answer`` returns them, fits the limit.

    Blocks that the network or its inputs cannot serve are dropped first. The first of the others is always kept, with a
    warning if it is above the limit. ``x`` is a batch on the network's device.
    """
    dropped = [(block.name, why) for block in blocks if (why := block.refusal(subject)) is not None]
    kept = [block for block in blocks if block.refusal(subject) is None]
    x = _part(model, x)
    while True:
        run = answer(tuple(kept))
        measured, error = price(model, run, x, limit)
        if measured <= limit or len(kept) == 1:
            break
        dropped.append((kept.pop().name, f"with it {measured:.2f} forward passes, above {limit:g}"))
    if measured > limit:
        warnings.warn(
            f"the budget must be at least {measured:.2f} for the block {kept[0].name!r}, which is kept alone; it was "
            f"{limit:g}. Each call has a fixed cost: larger batches or a larger network bring the price down",
            RuntimeWarning,
            stacklevel=5,  # whoever calls `TwoStageModel.fit`
        )
    predicted = 1 + sum(block.price(subject) for block in kept)
    names = tuple(block.name for block in kept)
    samples, single = batch_size(x), measured
    if samples > 1:
        single, _ = price(model, run, take(x, slice(0, 1), samples), limit)
    return PriceReport(names, predicted, measured, tuple(dropped), limit, error, samples, single)


def price(model: nn.Module, run: Callable[[Inputs], object], x: Inputs, limit: float = math.inf) -> tuple[float, float]:
    """Return the time of ``run`` divided by that of the plain ``model`` on ``x``: median over rounds, standard error.

    Measuring ends earlier if the price is certainly above ``limit``.
    """
    with evaluating(model), torch.no_grad():
        # Watching, planning and warming up are not part of the price.
        _seconds(lambda: run(x), model), _plain(model, x)
        ratios: list[float] = []
        begun = time.perf_counter()
        while len(ratios) < 3 or time.perf_counter() - begun < SECONDS:
            # The order alternates, because the second finds memory and caches as the first has left them.
            if len(ratios) % 2:
                taken, base = _seconds(lambda: run(x), model), _plain(model, x)
            else:
                base, taken = _plain(model, x), _seconds(lambda: run(x), model)
            ratios.append(taken / base)
            known = _error(ratios) < ERROR or statistics.median(ratios) - 3 * _error(ratios) > limit
            if known and len(ratios) >= ROUNDS:
                break
    return statistics.median(ratios), _error(ratios)


def _plain(model: nn.Module, x: Inputs) -> float:
    """Return the seconds that the plain network takes."""
    args, kwargs = as_call(copied(x))
    return _seconds(lambda: logits_of(model(*args, **kwargs)), model)


def _part(model: nn.Module, x: Inputs) -> Inputs:
    """Return the first 1, 2, 4, ... inputs of a batch, as many as the plain network answers in `PASS` seconds."""
    samples = batch_size(x)
    part: Inputs = take(x, slice(0, 1), samples)
    with evaluating(model), torch.no_grad():
        _plain(model, part)
        while (size := 2 * batch_size(part)) <= samples:
            larger: Inputs = take(x, slice(0, size), samples)
            # The smaller of two: a busy machine only adds to a time.
            if min(_plain(model, larger) for _ in range(2)) > PASS:
                break
            part = larger
    return part


def _error(ratios: Sequence[float]) -> float:
    """Return the standard error of the median, from order statistics one standard deviation of the rank around it."""
    ordered, count = sorted(ratios), len(ratios)
    rank = math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - rank)), min(count - 1, math.ceil(count / 2 + rank) - 1)
    return (ordered[high] - ordered[low]) / 2


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
