"""How the cost of whole-network features grows with batch, image, width and number of contrasts.

    python -m bench.micro.network.growth     # bench/results/network-growth.json and .md; about a minute

A residual-free convolutional network (3x3 kernels, batch norm in evaluation mode, three stages that halve the image
and double the width) is extracted beside one training step of the same batch (forward and full backward pass, no
optimizer), fastest of three. "Convolutions" is the time spent in the convolution norms alone, with the cost model's
prediction for it beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.harness import results_file
from fastgrad import GradientFeatures
from fastgrad.ops.conv import cost, sqnorm

BASE = {"batch": 16, "image": 32, "width": 32, "classes": 10, "target": "ones"}
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "batch size": [{"batch": n} for n in (1, 4, 16, 64)],
    "image size": [{"image": n} for n in (16, 32, 64)],
    "width": [{"width": n} for n in (16, 32, 64, 128)],
    "contrasts": [{"batch": 4, "target": "contrast", "classes": n} for n in (1, 10, 100)],
}


def network(width: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for block in range(2):
            out, stride = width << stage, 2 if stage and not block else 1
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)).eval()


def fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One point of a sweep."""
    torch.manual_seed(0)
    model = network(case["width"], case["classes"])
    x = torch.randn(case["batch"], 3, case["image"], case["image"])
    extractor = GradientFeatures(model, loss="bce", target=case["target"])

    def step() -> object:
        z = model(x)
        loss = F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="sum")
        return torch.autograd.grad(loss, list(model.parameters()))

    spent = {"measured": 0.0, "predicted": 0.0}
    solve = sqnorm._solve

    def watched(p: Any, route: str | None) -> torch.Tensor:
        start = time.perf_counter()
        norms = solve(p, route)
        spent["measured"] += time.perf_counter() - start
        shape = sqnorm.shape_of(p)
        spent["predicted"] += cost.seconds(cost.choose_route(shape), shape)
        return norms

    training, extraction = fastest(step), fastest(lambda: extractor(x))
    sqnorm._solve = watched
    try:
        extractor(x)
    finally:
        sqnorm._solve = solve
    return {
        **case, "training_ms": 1e3 * training, "extraction_ms": 1e3 * extraction, "ratio": extraction / training,
        "norms_ms": 1e3 * spent["measured"], "predicted_ms": 1e3 * spent["predicted"],
        "predicted_ratio": spent["predicted"] / spent["measured"],
    }  # fmt: skip


def main() -> None:
    columns = {
        "batch": "B", "image": "image", "width": "width", "classes": "N", "training_ms": "training step ms",
        "extraction_ms": "extraction ms", "ratio": "extraction / step", "norms_ms": "convolutions ms",
        "predicted_ms": "predicted ms", "predicted_ratio": "predicted / measured",
    }  # fmt: skip
    rows, sections = [], []
    for name, points in SWEEPS.items():
        part = [{"sweep": name, **measure({**BASE, **point})} for point in points]
        rows += part
        note = ": all N gradients of every sample, beside one training step" if name == "contrasts" else ""
        sections.append((f"By {name}{note}.", results_file.table(part, columns)))
    results_file.write(
        "network-growth", "How the cost of whole-network features grows", rows, sections, mode="full"
    )


if __name__ == "__main__":
    main()
