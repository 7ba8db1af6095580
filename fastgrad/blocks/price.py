"""What a block costs: measured in forward passes of the network, on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastgrad.batches import logits_of
from fastgrad.blocks.block import Block
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.logits import Logits
from fastgrad.blocks.subject import Subject
from fastgrad.engine.network import Network
from fastgrad.engine.run import Run

#: Rounds in which everything is timed in turn, and the seconds that they may take in all once each ran twice.
_ROUNDS = 7
_SECONDS = 6.0


def measure(
    model: nn.Module, subject: Subject, blocks: Sequence[Block], x: Inputs
) -> tuple[dict[str, float], float]:
    """Price of each block alone, and of all of them together, beyond the forward pass, in forward passes.

    Every extraction is timed in turn with the forward pass itself, so that a machine that slows down slows all.

    Args:
        model: The network.
        subject: What is known of it.
        blocks: What to price.
        x: A batch.

    Returns:
        Prices by name, and the price of all blocks in one extraction.
    """
    network = Network(model)
    args, kwargs = arguments(x)
    samples = next(v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim())

    def plain() -> None:
        with torch.no_grad():
            logits_of(network.forward(None, Run(samples), args, kwargs))

    runs: list[Callable[[], object]] = [plain]
    known = Extraction(model, [Logits()])
    known.known = subject
    for chosen in [*([block] for block in blocks), list(blocks)]:
        extraction = known.of(chosen)
        runs.append(lambda extraction=extraction: extraction(x))  # type: ignore[misc]
    for run in runs:
        # Watching, planning and warming up are no part of the price.
        run()
    times: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    for turn in range(_ROUNDS):
        for run, taken in zip(runs, times, strict=True):
            taken.append(_seconds(run))
        if turn >= 1 and time.perf_counter() - begun > _SECONDS:
            break
    ratios = [
        max(0.0, statistics.median(taken / base for taken, base in zip(column, times[0], strict=True)) - 1)
        for column in times[1:]
    ]
    return dict(zip((block.name for block in blocks), ratios, strict=False)), ratios[-1]


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
