"""The whole network: one squared gradient norm for every sample and parameter tensor.

Every implementation computes the same ``(B, P)`` matrix for the same loss and labels; the training step (one forward
and one full backward pass of the batch, without an optimizer) is the yardstick. Networks are in evaluation mode, where
samples do not mix; peers that insist on training mode get it where the network has nothing that depends on it.

A result is checked on the first and the last sample against a float64 backward pass of that sample alone, relative to
the norm itself, or to a millionth of a millionth of the sample's total where the true gradient is zero (the key's bias
of an attention, say). Allowed: 1e-4 for fastgrad, 1e-3 for the peers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS, images, stages
from bench.micro.tasks import BCE, CE, UNIT, Task, error, sqnorms
from bench.registry import Implementation, case

OURS, PEERS = 1e-4, 1e-3
FULL = [
    ("plain CNN 32x32", 64, BCE), ("ResNet-18 32x32", 64, BCE), ("ResNet-18 32x32", 8, CE),
    ("ResNet-18 group norm 32x32", 16, BCE), ("ResNet-50 64x64", 16, BCE), ("DenseNet-121 64x64", 8, BCE),
    ("ViT-B/16 64x64", 8, BCE), ("GPT T=128", 16, CE),
]  # fmt: skip
GPU = [
    ("ResNet-18 32x32", 512, BCE), ("ViT-B/16 224x224", 128, BCE), ("ResNet-18 32x32", 64, BCE),
    ("plain CNN 32x32", 512, BCE), ("ResNet-50 224x224", 64, BCE), ("GPT T=128", 256, CE),
]  # fmt: skip
#: A batch beyond which peers that run or hold sample by sample are left out on a GPU.
SLOW = 64
#: Batch, image, width.
GROWTH = (16, 32, 32)
one = partial(Implementation, graph=False)


def features(task: Task, compiled: bool = False) -> Callable[[], Tensor]:
    """Return fastgrad's norms of a task."""
    loss, target = task.signal.split()
    extractor = fastgrad.GradientFeatures(task.model, loss=loss, target=target, compile=compiled)
    return lambda: extractor(task.x)[1]


def same_for_all(task: Task) -> Iterator[Implementation]:
    """Yield fastgrad's norms and the training step."""
    yield one("fastgrad", partial(features, task), task.error, OURS)
    yield one("training step", partial(peers.step, task), task.against(peers.step), UNIT)


@case(
    "network", "{0} B={1} {2}", against="training step",
    names=("fastgrad", "training step", "forward", "forward and data gradients", "BackPACK BatchL2Grad",
           "Opacus ghost norms", "vmap(grad)", "per-sample loop"),
    tiny=[("plain CNN 8x8", 3, BCE), ("GPT T=6", 2, CE)],
    quick=[("plain CNN 32x32", 64, BCE), ("ResNet-18 32x32", 16, BCE)], full=FULL, gpu=GPU,
)  # fmt: skip
def network(device: str, name: str, batch: int, signal: str) -> Iterator[Implementation]:
    """Norms of one target."""
    task = Task(NETWORKS[name], batch, device, signal)
    yield from same_for_all(task)
    data_error = task.sample_by_sample if task.x.is_floating_point() else task.against
    yield one("forward", partial(peers.forward, task), task.against(peers.forward), UNIT)
    yield one(
        "forward and data gradients",
        partial(peers.data_gradients, task),
        data_error(peers.data_gradients),
        OURS,
    )
    yield one("BackPACK BatchL2Grad", partial(peers.backpack, task), task.error, PEERS)
    yield one("Opacus ghost norms", partial(peers.opacus, task), task.error, PEERS)
    if device == "cpu" or batch <= SLOW:
        yield one("vmap(grad)", partial(peers.vmap, task), task.error, PEERS)
        yield one("per-sample loop", partial(peers.loop, task), task.error, PEERS)


@case(
    "compiled", "{0} compiled B={1} {2}", against="training step",
    names=("fastgrad, compiled", "fastgrad", "training step", "training step, compiled"),
    tiny=[("plain CNN 8x8", 3, BCE)], full=FULL,
)  # fmt: skip
def compiled(device: str, name: str, batch: int, signal: str) -> Iterator[Implementation]:
    """Passes that ``torch.compile`` compiled; a compilation takes up to minutes."""
    task = Task(NETWORKS[name], batch, device, signal)
    yield one("fastgrad, compiled", partial(features, task, compiled=True), task.error, OURS)
    yield from same_for_all(task)
    yield one(
        "training step, compiled", partial(peers.step, task, compiled=True), task.against(peers.step), UNIT
    )


@case(
    "network-growth", "B={0} image={1} width={2}", against="training step", names=("fastgrad", "training step"),
    tiny=[(2, 8, 4)], quick=[GROWTH],
    full=[(1, 32, 32), (4, 32, 32), GROWTH, (64, 32, 32), (16, 16, 32), (16, 64, 32), (16, 32, 16), (16, 32, 64),
          (16, 32, 128)],
)  # fmt: skip
def growth(device: str, batch: int, image: int, width: int) -> Iterator[Implementation]:
    """How the cost grows with batch, image and width."""
    yield from same_for_all(Task((partial(stages, width), images(image)), batch, device))


@case(
    "network", "{0} B={1} all contrasts", against="training step",
    names=("fastgrad", "training step", "vmap(grad)", "per-sample loop"),
    tiny=[("plain CNN 8x8, 3 classes", 2)], full=[("ResNet-18 32x32", 8)], gpu=[("ResNet-18 32x32", 16)],
)  # fmt: skip
def contrasts(device: str, name: str, batch: int) -> Iterator[Implementation]:
    """All N contrasts through the whole network, ``(B, N, P)``, with cross-entropy."""
    task = Task(NETWORKS[name], batch, device)
    classes = int(peers.forward(task)().shape[1])

    def against(k: int, logits: Tensor) -> Tensor:
        labels = torch.full(logits.shape[:1], k, device=device)
        return F.cross_entropy(logits, labels, reduction="sum")

    def check(norms: Tensor) -> float:
        exact = task.double()
        return max(
            error(norms[b, k], sqnorms(against(k, exact.model(exact.x[b : b + 1])), exact.model))
            for b in (0, batch - 1)
            for k in (0, classes - 1)
        )

    def fast() -> Callable[[], Tensor]:
        extractor = fastgrad.GradientFeatures(task.model, loss="cross_entropy", target="contrast")
        return lambda: extractor(task.x)[1]

    def looped(make: Callable[[Task], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        calls = []
        for k in range(classes):
            single = copy.copy(task)
            single.loss = partial(against, k)  # type: ignore[method-assign]
            calls.append(make(single))
        return lambda: torch.stack([call() for call in calls], 1)

    yield one("fastgrad", fast, check, OURS)
    yield one("training step", partial(peers.step, task), task.against(peers.step), UNIT)
    yield one("vmap(grad)", partial(looped, peers.vmap), check, PEERS)
    yield one("per-sample loop", partial(looped, peers.loop), check, PEERS)
