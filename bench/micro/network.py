"""The whole network: one squared gradient norm for every sample and parameter tensor.

Every implementation computes the same ``(B, P)`` matrix for the same loss and labels; the training step (one forward
and one full backward pass of the batch, without an optimizer) is the yardstick. Networks are in evaluation mode, where
samples do not mix. Peers that need training mode get it if nothing in the network depends on the mode.

A result is checked on the first and the last sample against a float64 backward pass of that sample alone. Errors are
relative to the norm itself, or to 1e-12 of the sample's total if the true gradient is zero (an attention's key bias).
Errors allowed: 1e-4 for fastgrad, 1e-3 for the peers. Peers that give the norms of whole layers are checked on these.

``private`` is a training step whose gradients are clipped sample by sample, up to the noise. Where the network's own
rounding is more than half of 1e-4, twice that of a float32 loop over the samples is allowed.

``end-to-end`` is the time with and without uncertainty. There the error allowed for the last layer's norms is 1e-3,
because the logits that they follow are rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad
from bench.micro import layer_peers
from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS, images, plain
from bench.micro.tasks import BCE, CE, UNIT, ClippedTask, Task, middle_error, norm_error, sqnorms
from bench.registry import Implementation, case, relative_error, scaled_error

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
SIGNALS = [("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted")]
#: They give a norm for every layer, not for every parameter, and may leave layers out.
OF_LAYERS = {"dattri-llm": layer_peers.dattri_norms, "bergson": layer_peers.bergson_norms}
one = partial(Implementation, graph=False)


def features(task: Task, signal: str = "") -> Callable[[], Tensor]:
    """Return fastgrad's norms of a task, or of another signal."""
    loss, target = (signal or task.signal).split()
    extractor = fastgrad.GradientFeatures(task.model, loss=loss, target=target)
    return lambda: extractor(task.x)[1]


def same_for_all(task: Task) -> Iterator[Implementation]:
    yield one("fastgrad", partial(features, task), task.error, OURS)
    yield one("training step", partial(peers.step, task), task.against(peers.step), UNIT)


@case(
    "network", "{0} B={1} {2}", against="training step",
    names=("fastgrad", "training step", "forward", "forward and data gradients", "BackPACK BatchL2Grad",
           "Opacus ghost norms", "vmap(grad)", "per-sample loop", *OF_LAYERS),
    tiny=[("plain CNN 8x8", 3, BCE), ("GPT T=6", 2, CE)],
    quick=[("plain CNN 32x32", 64, BCE), ("ResNet-18 32x32", 16, BCE)], full=FULL, gpu=GPU,
)  # fmt: skip
def network(name: str, batch: int, signal: str, device: str) -> Iterator[Implementation]:
    """Norms of one target."""
    task = Task(NETWORKS[name], batch, device, signal)
    yield from same_for_all(task)
    yield one("forward", partial(peers.forward, task), task.against(peers.forward), UNIT)
    near = middle_error if task.x.is_floating_point() else scaled_error
    data_check = task.against(peers.data_gradients, near)
    yield one("forward and data gradients", partial(peers.data_gradients, task), data_check, OURS)
    yield one("BackPACK BatchL2Grad", partial(peers.backpack, task), task.error, PEERS)
    yield one("Opacus ghost norms", partial(peers.opacus, task), task.error, PEERS)
    # These two run sample by sample, or hold a gradient for each.
    if device == "cpu" or batch <= 64:
        yield one("vmap(grad)", partial(peers.vmap, task), task.error, PEERS)
        yield one("per-sample loop", partial(peers.loop, task), task.error, PEERS)
    for peer, prepare in OF_LAYERS.items():
        check, covered = partial(layer_peers.norm_errors, task), partial(layer_peers.covered, task)
        yield one(peer, partial(prepare, task), check, PEERS, covered=covered)


@case(
    "network-growth", "B={0} image={1} width={2}", against="training step", names=("fastgrad", "training step"),
    tiny=[(2, 8, 4)], quick=[(16, 32, 32)],
    full=[(1, 32, 32), (4, 32, 32), (16, 32, 32), (64, 32, 32), (16, 16, 32), (16, 64, 32), (16, 32, 16), (16, 32, 64),
          (16, 32, 128)],
)  # fmt: skip
def growth(batch: int, image: int, width: int, device: str) -> Iterator[Implementation]:
    """How the cost grows with batch, image and width."""
    yield from same_for_all(Task((partial(plain, width=width, norm=True), images(image)), batch, device))


@case(
    "network", "{0} B={1} all contrasts", against="training step",
    names=("fastgrad", "training step", "vmap(grad)", "per-sample loop"),
    tiny=[("plain CNN 8x8, 3 classes", 2)], full=[("ResNet-18 32x32", 8)], gpu=[("ResNet-18 32x32", 16)],
)  # fmt: skip
def contrasts(name: str, batch: int, device: str) -> Iterator[Implementation]:
    """All N contrasts through the whole network, ``(B, N, P)``, with cross-entropy."""
    task = Task(NETWORKS[name], batch, device)
    classes = int(peers.forward(task)().shape[1])
    each = [task.labelled(torch.full((batch,), k, device=device)) for k in range(classes)]

    def check(norms: Tensor) -> float:
        ends = itertools.product((0, batch - 1), (0, classes - 1))
        return max(norm_error(norms[b, k], sqnorms(each[k].double().gradient(b))) for b, k in ends)

    def looped(make: Callable[[Task], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        calls = [make(one) for one in each]
        return lambda: torch.stack([call() for call in calls], 1)

    yield one("fastgrad", partial(features, task, "cross_entropy contrast"), check, OURS)
    yield one("training step", partial(peers.step, task), task.against(peers.step), UNIT)
    yield one("vmap(grad)", partial(looped, peers.vmap), check, PEERS)
    yield one("per-sample loop", partial(looped, peers.loop), check, PEERS)


@case(
    "private", "{0} B={1} clipped", against="training step",
    names=("fastgrad", "training step", "Opacus hooks", "Opacus ghost clipping", "vmap(grad)"),
    tiny=[("plain CNN 8x8", 3)], quick=[("ResNet-18 group norm 32x32", 8)],
    full=[("ResNet-18 group norm 32x32", 64), ("ViT-B/16 64x64", 8), ("GPT T=128", 16)],
)  # fmt: skip
def private(name: str, batch: int, device: str) -> Iterator[Implementation]:
    """The sum of clipped gradients."""
    task = ClippedTask(NETWORKS[name], batch, device)
    allowed = max(OURS, 2 * task.rounding)
    yield one("fastgrad", partial(peers.clipped, task), task.distance, allowed)
    yield one("training step", partial(peers.step, task), task.against(peers.step), UNIT)
    yield one("Opacus hooks", partial(peers.clipped_by_hooks, task), task.distance, PEERS)
    yield one("Opacus ghost clipping", partial(peers.clipped_by_ghosts, task), task.distance, PEERS)
    yield one("vmap(grad)", partial(peers.clipped_by_vmap, task), task.distance, PEERS)


@case(
    "end-to-end", "{0} B={1}", against="network alone",
    names=("network alone", "fastgrad, last layer", "fastgrad, whole network", "fastgrad, three signals",
           "gradient per sample"),
    tiny=[("plain CNN 8x8", 2)], quick=[("plain CNN 32x32", 1), ("plain CNN 32x32", 64)],
    full=[("ResNet-18 32x32", 1), ("ResNet-18 32x32", 8), ("ResNet-18 32x32", 64), ("ViT-B/16 64x64", 1),
          ("ViT-B/16 64x64", 8)],
    gpu=[("ResNet-18 32x32", 512), ("ViT-B/16 224x224", 128)],
)  # fmt: skip
def end_to_end(name: str, batch: int, device: str) -> Iterator[Implementation]:
    """The network alone, with one kind of uncertainty, with three, and a backward pass per sample."""
    task = Task(NETWORKS[name], batch, device)

    def whole(signals: list[tuple[str, str]]) -> Callable[[], Any]:
        return partial(fastgrad.GradientFeatures(task.model, signals=signals), task.x)

    def whole_error(out: Any) -> float:
        return task.error(out[1][:, 0])

    def last_error(out: tuple[Tensor, Tensor]) -> float:
        return relative_error(out[1], last_layer(task.double())[1])

    yield one("network alone", partial(peers.forward, task), task.against(peers.forward), UNIT)
    yield one("fastgrad, last layer", lambda: partial(last_layer, task), last_error, PEERS)
    yield one("fastgrad, whole network", partial(whole, SIGNALS[:1]), whole_error, OURS)
    yield one("fastgrad, three signals", partial(whole, SIGNALS), whole_error, OURS)
    yield one("gradient per sample", partial(peers.loop, task), task.error, PEERS)


@torch.no_grad()
def last_layer(task: Task) -> tuple[Tensor, Tensor]:
    """Return logits and all contrasts of the last linear layer, whose input a hook records."""
    head = [m for m in task.model.modules() if isinstance(m, nn.Linear)][-1]
    caught: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, args: caught.append(args[0])):
        z = task.model(task.x)
    return z, fastgrad.contrast_sqnorm(caught[0], z)
