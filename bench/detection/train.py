"""Train the evaluated networks and keep them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.architectures import Classifier, residual_network
from bench.detection.data import sets
from bench.detection.transformer import Transformer, pretrained

#: Training images at the end of the training part that no network sees: detectors are fitted on them.
HELD_OUT = 5000
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)


class Recipe(NamedTuple):
    """How a network is made and trained.

    Attributes:
        make: Returns the untrained network.
        epochs: Passes over the data.
        rate: Highest learning rate.
        sizes: Image sizes, each for an equal share of the passes: coarse shapes are learned faster from small images.
        long: Whether the training takes hours on one core.
    """

    make: Callable[[], Classifier | Transformer]
    epochs: int
    rate: float
    sizes: tuple[int, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    long: bool = False


#: The first is small; the others are those of the literature on CIFAR-10.
RECIPES: dict[str, Recipe] = {
    "resnet": Recipe(residual_network, 8, 0.3),
    "resnet18": Recipe(
        partial(residual_network, width=64, stages=4, blocks=2, stride=1), 8, 0.15, (16, 24, 32, 32), long=True),
    "resnet20": Recipe(
        partial(residual_network, width=16, stages=3, blocks=3, stride=1), 12, 0.3, (16, 16, 24, 32)),
    "vit": Recipe(Transformer, 2, 1e-4, optimizer=partial(torch.optim.AdamW, weight_decay=0.05), long=True),
}  # fmt: skip


def file(network: str, seed: int, folder: Path) -> Path:
    return folder / f"{network}-{seed}-{RECIPES[network].epochs}.pt"


def shown(root: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels that networks are trained on: the training part of CIFAR-10 without its end."""
    images, labels = sets.load(root, "cifar10", "train").labelled()
    seen = len(images) - sets.held_out(len(images), HELD_OUT)
    return images[:seen], labels[:seen]


def augment_crop(x: Tensor, padded: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Crop at one random offset per quarter of the batch, and flip each image with probability 1/2."""
    size = x.shape[-1]
    parts = []
    for part in index.chunk(4):
        dy, dx = torch.randint(0, padded.shape[-1] - size + 1, (2,), generator=generator).tolist()
        parts.append(padded[part, :, dy : dy + size, dx : dx + size])
    images = torch.cat(parts)
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def fit(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int, rate: float = 0.3, batch: int = 128,
    sizes: Sequence[int] = (), optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> nn.Module:  # fmt: skip
    """Train a model in place with one cycle of the learning rate.

    Images ``(n, C, H, W)`` in [0, 1] are resized to each of ``sizes``, if there are any, for an equal share of the
    passes. Then ``change`` is applied to them. ``seed`` seeds order, crops and flips.
    """
    device = next(model.parameters()).device
    model = model.to(memory_format=torch.channels_last)
    batch = min(batch, len(images))
    steps = len(images) // batch
    descent = optimizer(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(descent, rate, total_steps=epochs * steps, pct_start=0.25)
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (3,) * 4, mode="reflect")
    # bfloat16 halves the time of a step if the processor has it, and takes seven times as long otherwise. Accuracy
    # changes by less than between seeds. PyTorch 2.8 does not report the capability.
    native = device.type != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    for epoch in range(epochs):
        model.train()
        start = time.perf_counter()
        for index in torch.randperm(len(images), generator=generator)[: steps * batch].view(steps, batch):
            x = augment_crop(images, padded, index, generator)
            if sizes and (size := sizes[epoch * len(sizes) // epochs]) != x.shape[-1]:
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
            x = change(x.to(device, memory_format=torch.channels_last))
            with torch.autocast(device.type, torch.bfloat16, enabled=native):
                loss = F.cross_entropy(model(x).float(), labels[index].to(device))
            descent.zero_grad()
            loss.backward()
            descent.step()
            schedule.step()
        if (taken := time.perf_counter() - start) > 60:
            print(f"epoch {epoch + 1} of {epochs}: {taken:.0f} s", file=sys.stderr, flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def fit_layer(layer: nn.Linear, h: Tensor, labels: Tensor, *, epochs: int, rate: float, batch: int) -> None:
    """Train a layer in place on inputs ``(n, D)`` and labels, by AdamW."""
    optimizer = torch.optim.AdamW(layer.parameters(), rate)
    for _ in range(epochs):
        for index in torch.randperm(len(h)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(layer(h[index]), labels[index]).backward()
            optimizer.step()


def logistic_layer(h: Tensor, labels: Tensor) -> nn.Linear:
    """Return the layer of a logistic regression on inputs ``(n, D)`` and labels."""
    found = LogisticRegression(max_iter=1000).fit(h.numpy(), labels.numpy())
    layer = nn.Linear(h.shape[1], len(found.coef_))
    layer.load_state_dict({"weight": torch.from_numpy(found.coef_), "bias": torch.from_numpy(found.intercept_)})
    return layer.requires_grad_(False)


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Begin a network's first convolution with filters that whiten patches of ``images``, and their negatives.

    A network that is trained briefly learns faster by it (Page, "How to train your ResNet", 2019; Jordan, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", 2024). Any remaining filters stay as they are.
    """
    weight = convolution.weight
    patches = F.unfold(images, weight.shape[-1]).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    widest_first = (directions / (variances + 1e-3).sqrt()).T.flip(0)
    filters = widest_first[: len(weight) // 2].view(-1, *weight.shape[1:])
    weight[: 2 * len(filters)] = torch.cat([filters, -filters])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(500), labels.split(500), strict=True)
    return float(sum((model(x).argmax(1) == y).sum() for x, y in parts)) / len(labels)


def trained(network: str, seed: int, root: Path, folder: Path) -> Any:
    """Return a network from the cache's ``folder``, or trained now and kept there, in evaluation mode."""
    recipe = RECIPES[network]

    def train(model: Any) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images, labels = shown(root)
        if isinstance(model, Transformer):
            model.encoder.load_state_dict(pretrained())
        else:
            stem = next(m for m in model.stem.modules() if isinstance(m, nn.Conv2d))
            whiten(stem, model.normalize(images[:2000]))
        how: dict[str, Any] = {"epochs": recipe.epochs, "sizes": recipe.sizes, "optimizer": recipe.optimizer}
        fit(model.to(device), images, labels, seed=seed, rate=recipe.rate, **how)
        score = accuracy(model.cpu(), *sets.load(root, "cifar10", "test").labelled())
        print(f"{network}, seed {seed}: {score:.1%} of test images right", file=sys.stderr, flush=True)

    torch.manual_seed(seed)
    kept = {"network": network, "seed": seed, "epochs": recipe.epochs}
    return cache.weights(file(network, seed, folder), recipe.make(), kept, train)
