"""pytorch-ood's gradient detectors beside those of `fastgrad.interop`: time, memory and scores on a ResNet-50.

python -m bench.interop
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torchvision.models import resnet50

from bench import clock
from bench.registry import SEED
from bench.report import pages

#: Batch size and side of the images.
CASES = ((8, 64), (32, 64), (128, 64), (8, 224))
DETECTORS, REPEATS = ("GradNorm", "GradUncertainty"), 2
TOOLS = {"fastgrad.interop": "fastgrad.interop", "pytorch-ood": "pytorch_ood.detector"}


def row(tool: str, detector: str, batch: int, side: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a case's row, measured in this process, and the scores: least processor time of two calls, peak bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model, x = resnet50(num_classes=10).eval(), torch.randn(batch, 3, side, side)
    package = importlib.import_module(TOOLS[tool])
    call = partial(getattr(package, detector)(model).predict, x)
    scores = call().double()
    seconds = min(clock.seconds(call, 1) for _ in range(REPEATS))
    made = {"tool": tool, "detector": detector, "B": batch, "side": side, "seconds": seconds}
    return made | {"peak_bytes": clock.peak_bytes(call, "cpu")}, scores


def measure() -> Iterator[dict[str, Any]]:
    """Yield the rows of each case; each tool has a process of its own."""
    for batch, side in CASES:
        for detector in DETECTORS:
            made = []
            for tool in TOOLS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    made.append(process.submit(row, tool, detector, batch, side).result())
            (ours, own), (theirs, reference) = made
            yield ours
            yield theirs | {"difference": float(((own - reference) / reference).abs().max())}


if __name__ == "__main__":
    pages.command("interop", __doc__, measure, packages=("torch", "torchvision", "pytorch-ood"))
