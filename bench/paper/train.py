"""Train the evaluated networks and keep them: ``python -m bench.paper.train --data DIR --cache DIR``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper import data
from bench.paper.networks import Classifier, dense_network, residual_network

#: Training images at the end of the training part that no network sees: detectors are fitted on them.
HELD_OUT = 5000


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; its fields name the cached file."""

    dataset: str = "cifar10"
    network: str = "resnet"
    seed: int = 0
    epochs: int = 8
    augment: str = "plain"

    def file(self) -> str:
        """The name of the cached weights."""
        return "-".join(str(value) for value in asdict(self).values()) + ".pt"


def build(recipe: Recipe, classes: int = 10) -> nn.Module:
    """An untrained network; of published size where a GPU is there, small on the CPU."""
    torch.manual_seed(recipe.seed)
    channels = 3 if recipe.dataset == "cifar10" else 1
    big = torch.cuda.is_available()
    if recipe.network == "resnet":
        sizes = {"width": 64, "stages": 4, "blocks": 2, "stride": 1} if big else {}
        return residual_network(channels, classes, **sizes)
    if big:
        return dense_network(channels, classes, layers=16, bottleneck=True, stride=1)
    return dense_network(channels, classes)


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
) -> nn.Module:
    """SGD with one cycle of the learning rate; ``change`` alters every batch after cropping."""
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
    # bfloat16 halves the time of a step on processors that have it; accuracy changes by less than a seed.
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images), generator=generator)[: steps * batch].view(steps, batch):
            x = augment_crop(images, padded, index, generator) if flips else images[index]
            x = x.to(device, memory_format=torch.channels_last)
            y = labels[index].to(device)
            if change is not None:
                x = change(model, x, y)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions."""
    device = next(model.parameters()).device
    right = [
        (model(x.to(device)).argmax(1).cpu() == y).sum()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(sum(right)) / len(labels)


def trained(recipe: Recipe, root: Path, cache: Path, train: data.Split | None = None) -> Classifier:
    """The network of ``recipe`` from the cache, or trained now and kept there. Evaluation mode."""
    model = build(recipe)
    path = cache / recipe.file()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()  # type: ignore[return-value]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = train or data.load(root, recipe.dataset, "train")
    assert split.labels is not None
    images = data.to_tensor(split.images[: len(split.images) - data.held_out(len(split.images), HELD_OUT)])
    labels = torch.from_numpy(split.labels[: len(images)])
    start = time.perf_counter()
    fit(
        model.to(device),
        images,
        labels,
        epochs=recipe.epochs,
        seed=recipe.seed,
        flips=recipe.dataset == "cifar10",
    )
    model = model.cpu()
    test = data.load(root, recipe.dataset, "test", 2000)
    assert test.labels is not None
    score = accuracy(model, test.tensor(), torch.from_numpy(test.labels))
    seconds = time.perf_counter() - start
    print(f"{recipe.file()}: {score:.1%} on 2,000 test images, {seconds:.0f} s", file=sys.stderr, flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()  # type: ignore[return-value]


def quick_recipes(seeds: int = 3, members: int = 5) -> list[Recipe]:
    """Every network that the quick tables share: both architectures, digits, and the ensemble's members."""
    both = [Recipe(network=network, seed=seed) for seed in range(seeds) for network in ("resnet", "densenet")]
    digits = [Recipe("mnist", "resnet", seed, epochs=2) for seed in range(seeds)]
    return both + digits + [Recipe(seed=seed) for seed in range(seeds, members)]


def _train_one(task: tuple[Recipe, Path, Path]) -> None:
    # One thread for each network: two networks beside each other train faster than one on two cores.
    torch.set_num_threads(1)
    trained(*task)


def train_all(recipes: list[Recipe], root: Path, cache: Path, workers: int) -> None:
    """Train what the cache lacks, one network per process; on a GPU one after the other."""
    missing = [(recipe, root, cache) for recipe in recipes if not (cache / recipe.file()).exists()]
    if torch.cuda.is_available() or workers < 2:
        for task in missing:
            _train_one(task)
        return
    with torch.multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_train_one, missing, chunksize=1)


def main() -> None:
    """Train the networks that the quick tables share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the .npz files or torchvision's"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for the trained networks")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="networks at a time")
    arguments = parser.parse_args()
    train_all(quick_recipes(), arguments.data, arguments.cache, arguments.workers)


if __name__ == "__main__":
    main()
