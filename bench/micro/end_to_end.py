"""Images per second with and without uncertainty, at fixed batch sizes; at batch 1 the spread is the latency.

The plain network is the yardstick. Beside it: logits and all contrasts of the last layer; logits and the squared
gradient norm of every parameter, for one signal and for three at once; and a backward pass for each sample, the usual
way to the same numbers. The last layer's norms are judged by 1e-3: they follow logits that rounded in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad
from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS
from bench.micro.network import OURS, PEERS, one
from bench.micro.tasks import UNIT, Task
from bench.registry import Implementation, case, relative_error

SIGNALS = [("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted")]


@case(
    "end-to-end", "{0} B={1}", against="network alone",
    names=("network alone", "fastgrad, last layer", "fastgrad, whole network", "fastgrad, three signals",
           "gradient per sample"),
    tiny=[("plain CNN 8x8", 2)], quick=[("plain CNN 32x32", 1), ("plain CNN 32x32", 64)],
    full=[("ResNet-18 32x32", 1), ("ResNet-18 32x32", 8), ("ResNet-18 32x32", 64), ("ViT-B/16 64x64", 1),
          ("ViT-B/16 64x64", 8)],
    gpu=[("ResNet-18 32x32", 512), ("ViT-B/16 224x224", 128)],
)  # fmt: skip
def end_to_end(device: str, name: str, batch: int) -> Iterator[Implementation]:
    """The network alone, with one kind of uncertainty, with three, and a backward pass a sample."""
    task = Task(NETWORKS[name], batch, device)

    def whole(signals: list[tuple[str, str]]) -> Callable[[], Any]:
        features = fastgrad.GradientFeatures(task.model, signals=signals)
        return lambda: features(task.x)

    def whole_error(out: Any) -> float:
        return task.error(out[1][:, 0])

    def last_error(out: tuple[Tensor, Tensor]) -> float:
        exact = task.double()
        return relative_error(out[1], last_layer(exact.model, exact.x)[1])

    last = partial(last_layer, task.model, task.x)
    yield one("network alone", partial(peers.forward, task), task.against(peers.forward), UNIT)
    yield one("fastgrad, last layer", lambda: last, last_error, PEERS)
    yield one("fastgrad, whole network", partial(whole, SIGNALS[:1]), whole_error, OURS)
    yield one("fastgrad, three signals", partial(whole, SIGNALS), whole_error, OURS)
    yield one("gradient per sample", partial(peers.loop, task), task.error, PEERS)


def last_layer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and all contrasts of the last linear layer, whose input is caught on the way."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        with torch.no_grad():
            z = model(x)
            return z, fastgrad.contrast_sqnorm(caught[0], z)
    finally:
        handle.remove()
