"""How little an image may change before it is flagged: one grey level of brightness, of noise, a shift by a pixel.

    python -m bench.detection.grey_levels --data DIR --cache CACHE

Each detector is fitted twice on the same clean images: as they are, and with half of them shifted by a constant of up
to one grey level, which is the default. Shares are of test images that neither network nor detector has seen, at a
false-alarm rate of 5 %. Attacks are foolbox's, on images that the network classifies rightly; those that mislead it
count. The network of Kuzushiji-MNIST, whose file has no labels, tells apart four rotations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from bench.detection.data import photographs, sets
from bench.detection.data.attacks import attack
from bench.detection.train import HELD_OUT, trained
from bench.report import pages
from fastgrad import TwoStageModel
from fastgrad.commands import demo
from fastgrad.detector import collect, fitting

LEVEL, BATCH = 1 / 255, 50
#: Whether half of the clean images are shifted, by the name in the table.
FORMS = {"as they are": False, "half shifted": True}
ATTACKS = {"FGSM 8/255": ("FGSM", 8 * LEVEL), "PGD 2/255": ("PGD", 2 * LEVEL), "PGD 8/255": ("PGD", 8 * LEVEL)}


class Case(NamedTuple):
    """A network, images and labels to fit and to test on, how many are attacked, and how many seeds are fitted."""

    model: nn.Module
    fit: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    attacked: int
    seeds: int


def _small(images: Tensor, labels: Tensor, trained_on: int, fitted_on: int, epochs: int) -> Case:
    """Return the demo's network, trained on the first images; it is fitted on the next ones and tested on the rest."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), demo.digit_network()
    pairs = list(zip(*(values.split([trained_on, fitted_on, len(images) - trained_on - fitted_on])
                       for values in (images, labels)), strict=True))  # fmt: skip
    demo.train(model, *pairs[0], epochs=epochs, generator=generator)
    return Case(model, pairs[1], pairs[2], 200, 3)


def digits(data: Path, cache: Path) -> Case:
    return _small(*demo.digits(torch.Generator().manual_seed(0)), 900, 500, 8)


def kuzushiji(data: Path, cache: Path) -> Case:
    with np.load(data / "kmnist-28.npz", allow_pickle=False) as file:
        images = torch.from_numpy(file["images"]).float()[:, None] / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:3900]
    labels = torch.arange(len(order)) % 4
    turned = torch.stack([x.rot90(int(k), (1, 2)) for x, k in zip(images[order], labels, strict=True)])
    return _small(nn.functional.interpolate(turned, (demo.SIDE, demo.SIDE), mode="area"), labels, 3000, 500, 4)


def cifar(data: Path, cache: Path) -> Case:
    model = trained("resnet", 0, data, cache).requires_grad_(False)
    fit = sets.load(data, "cifar10", "train", 800, -HELD_OUT).labelled()
    return Case(model, fit, sets.load(data, "cifar10", "test", 500).labelled(), 200, 3)


def pictures(data: Path, cache: Path) -> Case:
    split = photographs.photographs(data)
    order = np.random.default_rng(0).permutation(len(split.images))
    return Case(photographs.network(), split.at(order[:400]).labelled(), split.at(order[600:900]).labelled(), 100, 1)


#: Title, whether the share was chosen on it, and how it is made.
NETWORKS: Mapping[str, tuple[str, bool, Callable[[Path, Path], Case]]] = {
    "digits": ("three convolutions on digits (scikit-learn)", True, digits),
    "kuzushiji": ("three convolutions on Kuzushiji-MNIST", False, kuzushiji),
    "cifar10": ("a small residual network on CIFAR-10", True, cifar),
    "photographs": ("EfficientNet-Lite0 on photographs", False, pictures),
}


def altered(x: Tensor) -> dict[str, Tensor]:
    """Return the test images, and what is done to them; a shift in brightness may leave the range by one level."""
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1
    return {
        "clean": x, "+1/255": x + LEVEL, "-1/255": x - LEVEL, "-1/255, clipped": (x - LEVEL).clamp(min=0),
        "noise of 1/255": x + LEVEL * noise, "a pixel aside": x.roll(1, 3),
    }  # fmt: skip


@torch.no_grad()
def answered(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH)])


def misleading(case: Case) -> dict[str, Tensor]:
    """Return, of each attack, the images that mislead the network."""
    x, y = case.test
    right = (answered(case.model, x).argmax(1) == y).nonzero()[: case.attacked, 0]
    found = {}
    for name, (kind, radius) in ATTACKS.items():
        parts = [attack(case.model, x[part], y[part], kind, seed=0, epsilon=radius) for part in right.split(BATCH)]
        images = torch.cat(parts).detach()
        found[name] = images[answered(case.model, images).argmax(1) != y[right]]
    return found


def fitted(case: Case, seed: int, *, shifts: bool) -> TwoStageModel:
    """Return the default detector; without ``shifts``, the clean images are read as they are."""
    loader = list(zip(*(values.split(BATCH) for values in case.fit), strict=True))
    sample, extraction, blocks, _ = fitting.prepare(
        case.model, None, None, seed, correct=False, clean=loader, clip=(0.0, 1.0), verbose=False
    )
    sample = sample if shifts else replace(sample, levels=None)
    features = collect.read(extraction, sample, seed, verbose=False)
    return TwoStageModel(case.model, blocks=blocks, seed=seed).fit_features(features)


def measure(name: str, *, data: Path, cache: Path) -> Iterator[dict[str, Any]]:
    return rows(name, NETWORKS[name][2](data, cache))


def rows(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """Yield a row for each form: shares of flagged images, and AUROC of attacks."""
    attacks, shown = misleading(case), altered(case.test[0])
    for form, shifts in FORMS.items():
        found = []
        for seed in range(case.seeds):
            two_stage = fitted(case, seed, shifts=shifts)
            score = partial(answered, lambda x, model=two_stage: model(x).uncertainty)
            usual = score(shown["clean"])
            shares = {what: float((score(x) > two_stage.threshold()).double().mean()) for what, x in shown.items()}
            unusual = {what: score(x) for what, x in attacks.items() if len(x) >= 10}
            merits = {
                what: float(roc_auc_score([0] * len(usual) + [1] * len(other), torch.cat([usual, other])))
                for what, other in unusual.items()
            }
            found.append(shares | merits | {"mean of attacks": float(np.mean(list(merits.values())))})
        head = {"fitted": len(case.fit[0]), "tested": len(usual), "seeds": case.seeds}
        yield {"network": name, "case": "shares", "method": form, **head} | {
            what: round(float(np.mean([row[what] for row in found])), 4) for what in found[0]
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    pages.command(
        "grey-levels", __doc__, measure, NETWORKS, packages=("torch", "numpy", "scikit-learn", "foolbox"),
        facts={"networks": {name: about for name, (*about, _) in NETWORKS.items()}},
        data={"type": Path, "required": True, "help": "folder with the .npz files"},
        cache={"type": Path, "default": Path("detection-cache"), "help": "networks"},
    )  # fmt: skip
