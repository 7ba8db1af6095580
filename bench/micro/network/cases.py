"""Which networks are measured at which sizes, and what is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgrad
from bench.harness.case import Case, Implementation
from bench.micro import models
from bench.micro.models import images, tokens
from bench.micro.network import peers
from bench.micro.network.task import OURS, PEERS, Task, error


class Network(NamedTuple):
    """A network, how it and its inputs are made, and what it is asked."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    signal: str
    batch: int


#: The full size.
NETWORKS = (
    Network("plain CNN 32x32", models.plain, images(64, 32), "bce ones", 64),
    Network("ResNet-18 32x32", models.resnet, images(64, 32), "bce ones", 64),
    Network("ResNet-18 32x32", models.resnet, images(8, 32), "cross_entropy predicted", 8),
    Network(
        "ResNet-18 group norm 32x32",
        partial(models.resnet, norm=nn.GroupNorm),
        images(16, 32),
        "bce ones",
        16,
    ),
    Network("ResNet-50 64x64", partial(models.resnet, 50, 100, small=False), images(16, 64), "bce ones", 16),
    Network("DenseNet-121 64x64", models.densenet, images(8, 64), "bce ones", 8),
    Network("ViT-B/16 64x64", partial(models.ViT, 100, 64), images(8, 64), "bce ones", 8),
    Network("GPT T=128", models.GPT, tokens(16, 128, 8192), "cross_entropy predicted", 16),
)


def _case(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], signal: str,
    device: str, seed: int, batch: int, skip: tuple[str, ...] = (), dtype: torch.dtype = torch.float32,
    make: Callable[[Task], list[Implementation]] | None = None,
) -> Case:  # fmt: skip
    def implementations() -> list[Implementation]:
        task = Task(build, inputs, signal, device, seed, dtype)
        return [item for item in (make or _implementations)(task) if item.name not in skip]

    suffix = "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
    return Case(f"{name} B={batch} {signal}{suffix}", implementations, "training step")


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    case = partial(_case, device=device, seed=seed)
    if size == "tiny":
        yield case("plain CNN 8x8", partial(models.plain, width=4), images(3, 8), "bce ones", batch=3)
        small = partial(models.GPT, vocabulary=16, length=6, width=8, depth=1, heads=2)
        yield case("GPT T=6", small, tokens(2, 6, 16), "cross_entropy predicted", batch=2)
        yield contrast_case(
            "plain CNN 8x8", partial(models.plain, classes=3, width=4), images(2, 8), device, seed, 2
        )
        return
    if size == "quick":
        yield case("plain CNN 32x32", models.plain, images(64, 32), "bce ones", batch=64)
        yield case("ResNet-18 32x32", models.resnet, images(16, 32), "bce ones", batch=16)
        return
    if device == "cuda":
        yield from gpu_cases(device, seed)
        return
    for network in NETWORKS:
        yield case(**network._asdict())
    yield contrast_case("ResNet-18 32x32", models.resnet, images(8, 32), device, seed, 8)


def compiled_cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """Passes that ``torch.compile`` compiled, of every network; a compilation takes up to minutes."""
    case = partial(_case, device=device, seed=seed, make=_compiled)
    if size == "tiny":
        yield case(
            "plain CNN 8x8 compiled", partial(models.plain, width=4), images(3, 8), "bce ones", batch=3
        )
        return
    if size == "quick":
        return
    for network in NETWORKS:
        yield case(**network._replace(name=f"{network.name} compiled")._asdict())


def gpu_cases(device: str = "cuda", seed: int = 0, tiny: bool = False) -> Iterator[Case]:
    """Whole networks at training batch sizes."""
    if tiny:
        small = partial(models.plain, classes=2, width=4)
        yield contrast_case("plain CNN 8x8", small, images(2, 8), device, seed, 2)
        return
    case = partial(_case, device=device, seed=seed)
    slow = ("per-sample loop", "vmap(grad)")
    many = images(512, 32)
    yield case("ResNet-18 32x32", models.resnet, many, "bce ones", batch=512, skip=slow)
    yield case("ViT-B/16 224x224", models.ViT, images(128, 224), "bce ones", batch=128, skip=slow)
    yield case("ResNet-18 32x32", models.resnet, images(64, 32), "bce ones", batch=64)
    yield case(
        "ViT-B/16 224x224",
        models.ViT,
        images(128, 224),
        "bce ones",
        batch=128,
        skip=slow,
        dtype=torch.bfloat16,
    )
    yield case("plain CNN 32x32", models.plain, many, "bce ones", batch=512, skip=slow)
    large = partial(models.resnet, 50, 1000, small=False)
    yield case("ResNet-50 224x224", large, images(64, 224), "bce ones", batch=64, skip=slow)
    yield case(
        "GPT T=128", models.GPT, tokens(256, 128, 8192), "cross_entropy predicted", batch=256, skip=slow
    )
    yield contrast_case("ResNet-18 32x32", models.resnet, images(16, 32), device, seed, 16)


def features(task: Task, **options: bool) -> Callable[[], Tensor]:
    """This package's norms of a task."""
    loss, target = ("bce", "ones") if task.signal == "bce ones" else ("cross_entropy", "predicted")
    extractor = fastgrad.GradientFeatures(task.model, loss=loss, target=target, **options)  # type: ignore[arg-type]
    return lambda: extractor(task.x)[1]


def _compiled(task: Task) -> list[Implementation]:
    """What compilation makes of the pass; beside it, what it, and the memory that fastgrad keeps, make of a step."""
    ours = partial(Implementation, check=task.error, tolerance=OURS, graph=False)
    theirs = partial(
        Implementation, check=task.bias_error, tolerance=256 * torch.finfo(task.dtype).eps, graph=False
    )
    return [
        ours("fastgrad, compiled", lambda: features(task, compile=True)),
        ours("fastgrad", lambda: features(task)),
        theirs("training step", lambda: peers.step(task)),
        theirs("training step, memory kept", lambda: peers.step_in_kept_memory(task)),
        theirs("training step, compiled", lambda: peers.step(task, compiled=True)),
    ]


def _implementations(task: Task) -> list[Implementation]:
    half = task.dtype != torch.float32
    ours, theirs = (0.1, 0.5) if half else (OURS, PEERS)

    unit = 256 * torch.finfo(task.dtype).eps
    return [
        Implementation("fastgrad", lambda: features(task), task.error, ours, graph=False),
        Implementation("training step", lambda: peers.step(task), task.bias_error, unit, graph=False),
        Implementation("forward", lambda: peers.forward(task), task.forward_error, unit, graph=False),
        Implementation(
            "forward and data gradients", lambda: peers.data_gradients(task), task.data_error, ours, graph=False
        ),
        Implementation("BackPACK BatchL2Grad", lambda: peers.backpack(task), task.error, theirs, graph=False),
        Implementation("Opacus ghost norms", lambda: peers.opacus(task), task.error, theirs, graph=False),
        Implementation("vmap(grad)", lambda: peers.vmap(task), task.error, theirs, graph=False),
        Implementation("per-sample loop", lambda: peers.loop(task), task.error, theirs, graph=False),
    ]  # fmt: skip


def contrast_case(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], device: str, seed: int,
    batch: int,
) -> Case:  # fmt: skip
    """All N contrasts through the whole network, ``(B, N, P)``, with cross-entropy."""

    def implementations() -> list[Implementation]:
        task = Task(build, inputs, "bce ones", device, seed)
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
            features = fastgrad.GradientFeatures(task.model, loss="cross_entropy", target="contrast")
            return lambda: features(task.x)[1]

        def looped(make: Callable[[Task], Callable[[], Tensor]]) -> Callable[[], Tensor]:
            calls = []
            for k in range(classes):
                one = copy.copy(task)
                one.loss = partial(_against, k=k)
                calls.append(make(one))
            return lambda: torch.stack([call() for call in calls], 1)

        return [
            Implementation("fastgrad", fast, check, OURS, graph=False),
            Implementation(
                "training step", lambda: peers.step(task), task.bias_error, 256 * 2.0**-23, graph=False
            ),
            Implementation("vmap(grad)", lambda: looped(peers.vmap), check, PEERS, graph=False),
            Implementation("per-sample loop", lambda: looped(peers.loop), check, PEERS, graph=False),
        ]

    return Case(f"{name} B={batch} all contrasts", implementations, "training step")


def _against(logits: Tensor, k: int) -> Tensor:
    labels = torch.full(logits.shape[:1], k, device=logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")
