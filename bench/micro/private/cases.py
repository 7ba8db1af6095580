"""Which networks are trained at which sizes, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness.case import Case, Implementation
from bench.micro import models
from bench.micro.models import images, tokens
from bench.micro.private import peers
from bench.micro.private.task import OURS, PEERS, ClippedTask


def _case(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[torch.Generator], Tensor],
    device: str,
    seed: int,
) -> Case:
    def implementations() -> list[Implementation]:
        task = ClippedTask(build, inputs, device, seed)

        def one(
            name: str,
            make: Callable[[ClippedTask], peers.Call],
            allowed: float = PEERS,
            check: Callable[..., float] = task.error,
        ) -> Implementation:
            return Implementation(name, lambda: make(task), check, allowed, graph=False)

        return [
            one("fastgrad", peers.ours, OURS),
            one("training step", peers.step, OURS, task.step_error),
            one("Opacus hooks", peers.opacus_hooks),
            one("Opacus ghost clipping", peers.opacus_ghost),
            one("vmap(grad)", peers.functorch),
        ]

    return Case(f"{name} clipped", implementations, "training step")


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    case = partial(_case, device=device, seed=seed)
    grouped = partial(models.resnet, norm=nn.GroupNorm)
    if size == "tiny":
        yield case("plain CNN 8x8 B=3", partial(models.plain, width=4), images(3, 8))
        return
    if size == "quick":
        yield case("ResNet-18 group norm 32x32 B=8", grouped, images(8, 32))
        return
    yield case("ResNet-18 group norm 32x32 B=64", grouped, images(64, 32))
    yield case("ViT-B/16 64x64 B=8", partial(models.ViT, 100, 64), images(8, 64))
    yield case("GPT T=128 B=16", models.GPT, tokens(16, 128, 8192))
