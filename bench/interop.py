"""pytorch-ood's gradient detectors beside those of `fastgrad.interop`: time, memory and scores on a ResNet-50.

python -m bench.interop
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from bench import clock
from bench.registry import SEED
from bench.report import pages

#: Batch size and side of the images.
CASES = ((8, 64), (32, 64), (128, 64), (8, 224))
DETECTORS, REPEATS, BYTES = ("GradNorm", "GradUncertainty"), 2, 16 << 30


def rows(detector: str, batch: int, side: int) -> list[dict[str, Any]]:
    """Return the rows of a case, measured in this process: the least processor time of two calls, and peak bytes."""
    from pytorch_ood import detector as theirs
    from torchvision.models import resnet50

    from fastgrad import interop as ours

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model, x = resnet50(num_classes=10).eval(), torch.randn(batch, 3, side, side)
    made, scores = [], []
    for tool, package in (("fastgrad.interop", ours), ("pytorch-ood", theirs)):
        call = partial(getattr(package, detector)(model).predict, x)
        row: dict[str, Any] = {"tool": tool, "detector": detector, "B": batch, "side": side}
        try:
            scores.append(call().double())
            row["seconds"] = min(clock.seconds(call, 1) for _ in range(REPEATS))
            row["peak_bytes"] = clock.peak_bytes(call, "cpu")
        except RuntimeError as problem:
            if "can't allocate memory" not in str(problem):
                raise
            row["note"] = f"needs more than {BYTES >> 30} GiB"
        made.append(row)
    if len(scores) == 2:
        made[1]["difference"] = float(((scores[0] - scores[1]) / scores[1]).abs().max())
    return made


def measure() -> Iterator[dict[str, Any]]:
    """Yield the rows of each case, which has a process of its own."""
    for batch, side in CASES:
        for detector in DETECTORS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                yield from process.submit(rows, detector, batch, side).result()


if __name__ == "__main__":
    pages.command(
        "interop", __doc__, measure, packages=("torch", "torchvision", "pytorch-ood"), facts={"limit_bytes": BYTES},
    )  # fmt: skip
