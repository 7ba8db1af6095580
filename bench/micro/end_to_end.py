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
from bench.micro.network import BCE, made
from bench.micro.network_task import OURS, PEERS
from bench.registry import Implementation, Place, case, relative_error, scaled_error

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
def end_to_end(place: Place, name: str, batch: int) -> Iterator[Implementation]:
    """The network alone, with one kind of uncertainty, with three, and a backward pass a sample."""
    task = made(place, name, batch, BCE)
    model, x = task.model, task.x
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    exact, wide = task.double()
    with torch.no_grad():
        logits = exact(wide)
    unit = 256 * torch.finfo(task.dtype).eps

    def plain() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(x)
        return out

    def last() -> tuple[Tensor, Tensor]:
        # The head's input is caught on the way; the closed form needs nothing else.
        kept: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        try:
            with torch.no_grad():
                z = model(x)
                return z, fastgrad.contrast_sqnorm(kept[0], z)
        finally:
            handle.remove()

    def last_error(out: tuple[Tensor, Tensor]) -> float:
        kept: list[Tensor] = []
        inner = [m for m in exact.modules() if isinstance(m, nn.Linear)][-1]
        handle = inner.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        with torch.no_grad():
            exact(wide)
        handle.remove()
        return relative_error(out[1], fastgrad.contrast_sqnorm(kept[0], logits))

    def whole(signals: list[tuple[str, str]]) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            features = fastgrad.GradientFeatures(model, signals=signals)
            return lambda: features(x)

        return prepare

    one = partial(Implementation, graph=False)
    yield one("network alone", lambda: plain, lambda out: scaled_error(out, logits), unit)
    yield one("fastgrad, last layer", lambda: last, last_error, PEERS)
    yield one("fastgrad, whole network", whole(SIGNALS[:1]), lambda out: task.error(out[1][:, 0]), OURS)
    yield one("fastgrad, three signals", whole(SIGNALS), lambda out: task.error(out[1][:, 0]), OURS)
    yield one("gradient per sample", lambda: peers.loop(task), task.error, PEERS)
