"""Train the evaluated networks and keep them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.architectures import Classifier, dense_network, residual_network
from bench.detection.data import sets
from bench.detection.small_maps import products

#: Training images at the end of the training part that no network sees: detectors are fitted on them.
HELD_OUT = 5000
#: From the numbers of channels and classes to an untrained network. The first two are small, for trials; the others are
#: those of the literature on CIFAR-10.
NETWORKS: Mapping[str, Callable[[int, int], Classifier]] = {
    "resnet": residual_network,
    "densenet": dense_network,
    "resnet18": partial(residual_network, width=64, stages=4, blocks=2, stride=1),
    "densenet-bc": partial(dense_network, layers=16, bottleneck=True, stride=1),
}
#: Highest learning rates and passes over the data of those of the literature.
RATES: Mapping[str, float] = {"resnet18": 0.15, "densenet-bc": 0.15}
EPOCHS: Mapping[str, int] = {"resnet18": 24, "densenet-bc": 10}
#: Pixels of the images, each for an equal share of the passes: coarse shapes are learned from small ones as well, in
#: half of the time.
SIZES: Mapping[str, tuple[int, ...]] = {"resnet18": (16, 24, 32, 32), "densenet-bc": (16, 16, 16, 24, 32)}


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; its fields name the cached file and are written into it."""

    dataset: str = "cifar10"
    network: str = "resnet"
    seed: int = 0
    epochs: int = 8
    augment: str = "plain"

    def file(self) -> str:
        """The name of the cached weights."""
        return "-".join(str(value) for value in asdict(self).values()) + ".pt"


def build(recipe: Recipe, classes: int = 10) -> nn.Module:
    """An untrained network.

    Raises:
        ValueError: ``recipe.network`` is none of `NETWORKS`.
    """
    if recipe.network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; it was {recipe.network!r}")
    torch.manual_seed(recipe.seed)
    return NETWORKS[recipe.network](3 if recipe.dataset == "cifar10" else 1, classes)


def augment_crop(x: Tensor, padded: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """One random crop offset per quarter of the batch and a flip of every second image."""
    size = x.shape[-1]
    parts = []
    for part in index.chunk(4):
        dy, dx = torch.randint(0, padded.shape[-1] - size + 1, (2,), generator=generator).tolist()
        parts.append(padded[part, :, dy : dy + size, dx : dx + size])
    images = torch.cat(parts)
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    rate: float = 0.3,
    batch: int = 128,
    change: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    flips: bool = True,
    sizes: Sequence[int] = (),
    progress: cache.Progress | None = None,
) -> nn.Module:
    """SGD with one cycle of the learning rate.

    Args:
        model: Trained in place.
        images: ``(n, C, H, W)`` in [0, 1].
        labels: ``(n,)``.
        epochs: Passes over the data.
        seed: Of order, crops and flips.
        rate: Highest learning rate.
        batch: Images of a step.
        change: Alters every batch after cropping.
        flips: Whether images are cropped and flipped.
        sizes: Pixels that images are brought to, each for an equal share of the passes; none for their own.
        progress: Where each pass is kept, and taken from to go on.
    """
    device = next(model.parameters()).device
    model = model.to(memory_format=torch.channels_last)
    batch = min(batch, len(images))
    steps = len(images) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * steps, pct_start=0.25
    )
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (3,) * 4, mode="reflect")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begun = 0
    if progress is not None and (state := progress.load()) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        begun = state["passes"]
    # bfloat16 halves the time of a step on processors with matrix units; accuracy changes by less than a seed.
    for epoch in range(begun, epochs):
        model.train()
        start = time.perf_counter()
        for index in torch.randperm(len(images), generator=generator)[: steps * batch].view(steps, batch):
            x = augment_crop(images, padded, index, generator) if flips else images[index]
            if sizes and (size := sizes[epoch * len(sizes) // epochs]) != x.shape[-1]:
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
            x = x.to(device, memory_format=torch.channels_last)
            y = labels[index].to(device)
            if change is not None:
                x = change(model, x, y)
            with products(model), torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress.keep(
                {name: part.state_dict() for name, part in parts.items()}
                | {"generator": generator.get_state(), "passes": epoch + 1}
            )
        if (taken := time.perf_counter() - start) > 60:
            print(f"epoch {epoch + 1} of {epochs}: {taken:.0f} s", file=sys.stderr, flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Begin with filters that whiten patches, and their negatives; what filters are left over stay as they are.

    A network that is trained briefly learns faster by it (Page, "How to train your ResNet", 2019; Jordan, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", 2024).

    Args:
        convolution: The network's first, changed in place.
        images: ``(n, C, H, W)`` as they enter it.
    """
    weight = convolution.weight
    patches = F.unfold(images, weight.shape[-1]).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    widest_first = (directions / (variances + 1e-3).sqrt()).T.flip(0)
    filters = widest_first[: len(weight) // 2].view(-1, *weight.shape[1:])
    weight[: 2 * len(filters)] = torch.cat([filters, -filters])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions."""
    device = next(model.parameters()).device
    right = [
        (model(x.to(device)).argmax(1).cpu() == y).sum()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(sum(right)) / len(labels)


def trained(recipe: Recipe, root: Path, folder: Path) -> Classifier:
    """The network of ``recipe`` from the cache's ``folder``, or trained now and kept there. Evaluation mode."""

    def train(model: nn.Module) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images, labels = sets.load(root, recipe.dataset, "train").labelled()
        seen = len(images) - sets.held_out(len(images), HELD_OUT)
        start, flips = time.perf_counter(), recipe.dataset == "cifar10"
        if recipe.network in RATES:
            assert isinstance(model, Classifier)
            stem = next(m for m in model.stem.modules() if isinstance(m, nn.Conv2d))
            whiten(stem, model.normalize(images[:2000]))
        fit(
            model.to(device), images[:seen], labels[:seen], epochs=recipe.epochs, seed=recipe.seed, flips=flips,
            rate=RATES.get(recipe.network, 0.3), sizes=SIZES.get(recipe.network, ()), progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        images, labels = sets.load(root, recipe.dataset, "test").labelled()
        score = accuracy(model.cpu(), images, labels)
        words = f"{score:.1%} on {len(labels):,} test images, {seconds:.0f} s"
        print(f"{recipe.file()}: {words}", file=sys.stderr, flush=True)

    # Where there is a GPU the networks are larger.
    made_by = asdict(recipe) | {"parameters": sum(p.numel() for p in build(recipe).parameters())}
    path = folder / recipe.file()
    # Of what takes hours each pass is kept.
    progress = cache.Progress(path.with_suffix(".progress"), made_by) if recipe.network in RATES else None
    found = cache.weights(path, build(recipe), made_by, train)
    if progress is not None:
        progress.forget()
    return found  # type: ignore[return-value]
