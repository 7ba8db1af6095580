"""How the cost of whole-network features grows with batch, image, width and number of contrasts.

A residual-free convolutional network: 3x3 kernels, batch norm in evaluation mode, three stages that halve the image and
double the width. The yardstick is one training step of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

import fastgrad
from bench.micro import network_peers as peers
from bench.micro.models import images
from bench.micro.network_task import OURS, Task
from bench.registry import Implementation, Place, case

BASE = (16, 32, 32)


def stages(width: int) -> nn.Sequential:
    """Return the network."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for block in range(2):
            out, stride = width << stage, 2 if stage and not block else 1
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


@case(
    "network-growth", "B={0} image={1} width={2}", against="training step", names=("fastgrad", "training step"),
    tiny=[(2, 8, 4)], quick=[BASE],
    full=[(1, 32, 32), (4, 32, 32), BASE, (64, 32, 32), (16, 16, 32), (16, 64, 32), (16, 32, 16), (16, 32, 64),
          (16, 32, 128)],
)  # fmt: skip
def growth(place: Place, batch: int, image: int, width: int) -> Iterator[Implementation]:
    """Norms of one target."""
    task = Task(partial(stages, width), images(batch, image), "bce ones", place.device, place.seed)
    extractor = fastgrad.GradientFeatures(task.model, loss="bce", target="ones")
    yield Implementation("fastgrad", lambda: lambda: extractor(task.x)[1], task.error, OURS, graph=False)
    yield Implementation(
        "training step", lambda: peers.step(task), task.bias_error, 256 * 2.0**-23, graph=False
    )
