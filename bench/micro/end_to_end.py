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
from bench.harness.case import Case, Implementation, relative_error, scaled_error
from bench.micro import models
from bench.micro.network import peers
from bench.micro.network.task import OURS, PEERS, Task

SIGNALS = [("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted")]


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    if size == "tiny":
        yield _case("plain CNN 8x8", partial(models.plain, width=4), 8, 2, device, seed)
        return
    if size == "quick":
        yield _case("plain CNN 32x32", models.plain, 32, 1, device, seed)
        yield _case("plain CNN 32x32", models.plain, 32, 64, device, seed)
        return
    batches = (1, 8, 64) if device == "cpu" else (1, 32, 512)
    for batch in batches:
        yield _case("ResNet-18 32x32", models.resnet, 32, batch, device, seed)
    for batch in (1, 8) if device == "cpu" else (1, 128):
        small = partial(models.ViT, 100, 64) if device == "cpu" else models.ViT
        yield _case(f"ViT-B/16 {64 if device == 'cpu' else 224}px", small, 64 if device == "cpu" else 224, batch,
                    device, seed)  # fmt: skip


def _case(name: str, build: Callable[[], nn.Module], pixels: int, batch: int, device: str, seed: int) -> Case:
    def inputs(made: torch.Generator) -> Tensor:
        return torch.randn(batch, 3, pixels, pixels, generator=made)

    def implementations() -> list[Implementation]:
        return _implementations(Task(build, inputs, "bce ones", device, seed))

    return Case(f"{name} B={batch}", implementations, "network alone")


def _implementations(task: Task) -> list[Implementation]:
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

    return [
        Implementation("network alone", lambda: plain, lambda out: scaled_error(out, logits), unit, graph=False),
        Implementation("fastgrad, last layer", lambda: last, last_error, PEERS, graph=False),
        Implementation("fastgrad, whole network", whole(SIGNALS[:1]), lambda out: task.error(out[1][:, 0]), OURS,
                       graph=False),
        Implementation("fastgrad, three signals", whole(SIGNALS), lambda out: task.error(out[1][:, 0]), OURS,
                       graph=False),
        Implementation("gradient per sample", lambda: peers.loop(task), task.error, PEERS, graph=False),
    ]  # fmt: skip
