"""The price of a set of blocks, measured as it will run, and the part of the set that fits a limit.

A price is the time of an answer over that of the plain network, on the same inputs and device, measured in turns. It
holds for batches of the loader's size: the fixed cost of each call weighs most for fast networks on single inputs. So
the price of single inputs is measured too, and reported if it exceeds the limit; leaving out a block lowers it little.
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
from fastgrad.challenges.attacks import evaluating

#: In the order of their AUROC gain for their price; where a set is above its limit, blocks are taken off the end. Tuned
#: on photographs with EfficientNet-Lite0 and Lite1, with an earlier form of image statistics and roughness: without
#: roughness the mean AUROC of unseen cases fell by .008, without image statistics by .006. Contrasts, h and gradient
#: norms added nothing to these.
DEFAULT_BLOCKS: tuple[str, ...] = ("logits", "activations", "image", "roughness")
#: With a second forward pass on the enlarged centre: AUROC of attacks that went through JPEG gained .03 to .05.
EXTENDED_BLOCKS: tuple[str, ...] = (*DEFAULT_BLOCKS, "view")
#: Forward passes from which on the second one is affordable.
EXTENDED_FROM = 2.0
#: Standard error of a price that ends its measurement, rounds at least, seconds at most once there are so many.
ERROR, ROUNDS, SECONDS = 0.03, 7, 4.0
#: Seconds that the plain network may take for the measured inputs: larger batches are cut.
PASS = 0.1


@dataclass(frozen=True)
class PriceReport:
    """The blocks that fit a limit, and their price in forward passes, the one that gives the logits included.

    Attributes:
        blocks: Names, in the order of the preset.
        predicted: Price by counted operations.
        measured: Price by the clock: a median over rounds.
        dropped: Names of the other blocks, each with the reason.
        limit: The largest price allowed, the budget.
        error: Standard error of ``measured``.
        batch: Inputs at a time while it was measured.
        single: The price of one input at a time.
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
    """Take blocks off the end until the measured price of the others, as what ``answer`` makes of them, fits the limit.

    Blocks that the network or its inputs cannot serve are dropped first. The first of the others stays in any case; a
    warning says so where it is above the limit. ``x`` is a batch on the network's device.
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
    """Time of ``run`` over that of the plain ``model`` on ``x``: the median over rounds, and its standard error.

    Measuring ends earlier where the price is certainly above ``limit``.
    """
    with evaluating(model), torch.no_grad():
        # Watching, planning and warming up are no part of the price.
        _seconds(lambda: run(x), model), _plain(model, x)
        ratios: list[float] = []
        begun = time.perf_counter()
        while len(ratios) < 3 or time.perf_counter() - begun < SECONDS:
            # Whichever comes second finds memory and caches as the first has left them.
            if len(ratios) % 2:
                taken, base = _seconds(lambda: run(x), model), _plain(model, x)
            else:
                base, taken = _plain(model, x), _seconds(lambda: run(x), model)
            ratios.append(taken / base)
            known = _error(ratios) < ERROR or statistics.median(ratios) - 3 * _error(ratios) > limit
            if known and len(ratios) >= ROUNDS:
                break
    return statistics.median(ratios), _error(ratios)


def device_of(model: nn.Module) -> torch.device:
    """Where the network's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _plain(model: nn.Module, x: Inputs) -> float:
    """Seconds of the plain network."""
    args, kwargs = as_call(copied(x))
    return _seconds(lambda: logits_of(model(*args, **kwargs)), model)


def _part(model: nn.Module, x: Inputs) -> Inputs:
    """The first 1, 2, 4, ... inputs of a batch that the plain network takes at most a tenth of a second for."""
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
    """Standard error of the median, from the order statistics one standard deviation of the rank below and above."""
    ordered, count = sorted(ratios), len(ratios)
    rank = math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - rank)), min(count - 1, math.ceil(count / 2 + rank) - 1)
    return (ordered[high] - ordered[low]) / 2


def _seconds(run: Callable[[], object], model: nn.Module) -> float:
    """Of one call where ``model`` is; on a CPU with one thread, of that thread alone, whatever else is running."""
    device = device_of(model)
    # Windows counts a thread's time in steps of 16 ms, in which a small network takes none.
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and hasattr(time, "CLOCK_THREAD_CPUTIME_ID")
    clock = time.thread_time if alone else time.perf_counter
    backend = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else backend.device(device):
        backend.synchronize(device)
        begun = clock()
        run()
        backend.synchronize(device)
        return clock() - begun
