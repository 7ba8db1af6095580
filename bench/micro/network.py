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
from torch import Tensor, nn

import fastgrad
from bench.micro import models
from bench.micro import network_peers as peers
from bench.micro.models import images, tokens
from bench.micro.network_task import OURS, PEERS, Task, error
from bench.registry import Implementation, Place, case

Made = tuple[Callable[[], nn.Module], Callable[[int], Callable[[torch.Generator], Tensor]]]
#: Each network, and its inputs given a batch.
NETWORKS: dict[str, Made] = {
    "plain CNN 8x8": (partial(models.plain, width=4), partial(images, size=8)),
    "plain CNN 8x8, 3 classes": (partial(models.plain, classes=3, width=4), partial(images, size=8)),
    "plain CNN 32x32": (models.plain, partial(images, size=32)),
    "ResNet-18 32x32": (models.resnet, partial(images, size=32)),
    "ResNet-18 group norm 32x32": (partial(models.resnet, norm=nn.GroupNorm), partial(images, size=32)),
    "ResNet-50 64x64": (partial(models.resnet, 50, 100, small=False), partial(images, size=64)),
    "ResNet-50 224x224": (partial(models.resnet, 50, 1000, small=False), partial(images, size=224)),
    "DenseNet-121 64x64": (models.densenet, partial(images, size=64)),
    "ViT-B/16 64x64": (partial(models.ViT, 100, 64), partial(images, size=64)),
    "ViT-B/16 224x224": (models.ViT, partial(images, size=224)),
    "GPT T=6": (
        partial(models.GPT, vocabulary=16, length=6, width=8, depth=1, heads=2),
        partial(tokens, length=6, vocabulary=16),
    ),
    "GPT T=128": (models.GPT, partial(tokens, length=128, vocabulary=8192)),
}
BCE, CE = "bce ones", "cross_entropy predicted"
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


def features(task: Task, compiled: bool = False) -> Callable[[], Tensor]:
    """Return fastgrad's norms of a task."""
    loss, target = ("bce", "ones") if task.signal == BCE else ("cross_entropy", "predicted")
    extractor = fastgrad.GradientFeatures(task.model, loss=loss, target=target, compile=compiled)
    return lambda: extractor(task.x)[1]


@case(
    "network", "{0} B={1} {2}", against="training step",
    names=("fastgrad", "training step", "forward", "forward and data gradients", "BackPACK BatchL2Grad",
           "Opacus ghost norms", "vmap(grad)", "per-sample loop"),
    tiny=[("plain CNN 8x8", 3, BCE), ("GPT T=6", 2, CE)],
    quick=[("plain CNN 32x32", 64, BCE), ("ResNet-18 32x32", 16, BCE)], full=FULL, gpu=GPU,
)  # fmt: skip
def network(place: Place, name: str, batch: int, signal: str) -> Iterator[Implementation]:
    """Norms of one target."""
    task = made(place, name, batch, signal)
    one = partial(Implementation, graph=False)
    unit = 256 * torch.finfo(task.dtype).eps
    yield one("fastgrad", lambda: features(task), task.error, OURS)
    yield one("training step", lambda: peers.step(task), task.bias_error, unit)
    yield one("forward", lambda: peers.forward(task), task.forward_error, unit)
    yield one("forward and data gradients", lambda: peers.data_gradients(task), task.data_error, OURS)
    yield one("BackPACK BatchL2Grad", lambda: peers.backpack(task), task.error, PEERS)
    yield one("Opacus ghost norms", lambda: peers.opacus(task), task.error, PEERS)
    if place.device == "cpu" or batch <= SLOW:
        yield one("vmap(grad)", lambda: peers.vmap(task), task.error, PEERS)
        yield one("per-sample loop", lambda: peers.loop(task), task.error, PEERS)


@case(
    "compiled", "{0} compiled B={1} {2}", against="training step",
    names=("fastgrad, compiled", "fastgrad", "training step", "training step, compiled"),
    tiny=[("plain CNN 8x8", 3, BCE)], full=FULL,
)  # fmt: skip
def compiled(place: Place, name: str, batch: int, signal: str) -> Iterator[Implementation]:
    """Passes that ``torch.compile`` compiled; a compilation takes up to minutes."""
    task = made(place, name, batch, signal)
    one = partial(Implementation, graph=False)
    unit = 256 * torch.finfo(task.dtype).eps
    yield one("fastgrad, compiled", lambda: features(task, compiled=True), task.error, OURS)
    yield one("fastgrad", lambda: features(task), task.error, OURS)
    yield one("training step", lambda: peers.step(task), task.bias_error, unit)
    yield one("training step, compiled", lambda: peers.step(task, compiled=True), task.bias_error, unit)


@case(
    "network", "{0} B={1} all contrasts", against="training step",
    names=("fastgrad", "training step", "vmap(grad)", "per-sample loop"),
    tiny=[("plain CNN 8x8, 3 classes", 2)], full=[("ResNet-18 32x32", 8)], gpu=[("ResNet-18 32x32", 16)],
)  # fmt: skip
def contrasts(place: Place, name: str, batch: int) -> Iterator[Implementation]:
    """All N contrasts through the whole network, ``(B, N, P)``, with cross-entropy."""
    task = made(place, name, batch, BCE)
    classes = int(peers.forward(task)().shape[1])

    def check(norms: Tensor) -> float:
        model, x = task.double()
        worst = 0.0
        for b in (0, len(x) - 1):
            for k in (0, classes - 1):
                loss = F.cross_entropy(model(x[b : b + 1]), torch.tensor([k], device=x.device))
                grads = torch.autograd.grad(loss, list(model.parameters()))
                worst = max(worst, error(norms[b, k], torch.stack([g.square().sum() for g in grads])))
        return worst

    def fast() -> Callable[[], Tensor]:
        extractor = fastgrad.GradientFeatures(task.model, loss="cross_entropy", target="contrast")
        return lambda: extractor(task.x)[1]

    def looped(make: Callable[[Task], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        calls = []
        for k in range(classes):
            one = copy.copy(task)
            one.loss = partial(_against, k=k)
            calls.append(make(one))
        return lambda: torch.stack([call() for call in calls], 1)

    one = partial(Implementation, graph=False)
    yield one("fastgrad", fast, check, OURS)
    yield one("training step", lambda: peers.step(task), task.bias_error, 256 * 2.0**-23)
    yield one("vmap(grad)", lambda: looped(peers.vmap), check, PEERS)
    yield one("per-sample loop", lambda: looped(peers.loop), check, PEERS)


def made(place: Place, name: str, batch: int, signal: str) -> Task:
    """Return the network, its batch and its loss."""
    build, inputs = NETWORKS[name]
    return Task(build, inputs(batch), signal, place.device, place.seed)


def _against(logits: Tensor, k: int) -> Tensor:
    labels = torch.full(logits.shape[:1], k, device=logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")
