"""Find wrong labels: Fashion-MNIST, one label in ten flipped, early and late in training.

    python -m bench.audit --data FOLDER --out bench/results

A draw is a subset of the data, the flips, and the networks' beginnings. In every draw one network sees all samples; it
ranks what it was trained on. Three more see two thirds each and rank the third that they have not seen; that is what
cleanlab is made for, and what the other columns are given too. Every score is taken after several epochs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad
from bench.detection.data import sets
from bench.report import pages
from bench.results_file import parser
from fastgrad.metrics import auroc
from fastgrad.plots import COLOURS, new_axes, save

CLASSES, FLIPPED, FOLDS = 10, 0.1, 3
Scores = dict[str, NDArray[np.float64]]


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 25, CLASSES),
    )  # fmt: skip


def trained(images: Tensor, labels: Tensor, epochs: list[int]) -> Iterator[tuple[int, nn.Module]]:
    """A network after each of ``epochs``."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(1, max(epochs) + 1):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch in epochs:
            yield epoch, model


def scores(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """What each way makes of the samples; higher means more suspicious."""
    loader = list(zip(images.split(250), labels.split(250), strict=True))
    table = fastgrad.rank_samples(model, loader, verbose=False)
    last = fastgrad.rank_samples(model, loader, layers="5", verbose=False)
    with torch.no_grad():
        probabilities = torch.cat([model(x).double().softmax(1) for x in images.split(250)])
    return {
        "GraNd": table.grand,
        "GraNd, last layer": last.grand,
        "EL2N": table.el2n,
        "loss": table.loss,
        "confidence": 1 - probabilities.amax(1).numpy(),
        "probabilities": probabilities.numpy(),
    }


def draw(images: Tensor, truth: Tensor, seed: int, epochs: list[int]) -> list[dict[str, Any]]:
    """One draw: a row for every score, epoch and way of training."""
    torch.manual_seed(seed)
    wrong = torch.rand(len(truth)) < FLIPPED
    labels = torch.where(wrong, (truth + torch.randint(1, CLASSES, truth.shape)) % CLASSES, truth)
    flipped = wrong.numpy()
    found: dict[tuple[str, int], Scores] = {}
    for epoch, model in trained(images, labels, epochs):
        found["seen", epoch] = scores(model, images, labels)
    fold = torch.randperm(len(truth)) % FOLDS
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        for epoch, model in trained(images[inside], labels[inside], epochs):
            for name, values in scores(model, images[outside], labels[outside]).items():
                whole = found.setdefault(("unseen", epoch), {}).setdefault(
                    name, np.empty((len(truth), *values.shape[1:]))
                )
                whole[outside.numpy()] = values
    rows = []
    for (samples, epoch), columns in found.items():
        probabilities = columns.pop("probabilities")
        # Label quality, turned round.
        quality = get_label_quality_scores(labels.numpy(), probabilities, method="normalized_margin")
        columns["cleanlab"] = 1 - np.asarray(quality)
        answers = probabilities.argmax(1)
        for name, values in columns.items():
            first = np.argsort(-values)[: flipped.sum()]
            rows.append(
                {
                    "seed": seed, "samples": samples, "epoch": epoch, "score": name,
                    "auroc": auroc(values[~flipped], values[flipped]), "precision": float(flipped[first].mean()),
                    "accuracy": float((answers == truth.numpy()).mean()),
                    "learnt": float((answers == labels.numpy())[flipped].mean()),
                }
            )  # fmt: skip
    return rows


def figure(rows: list[dict[str, Any]], epochs: list[int], path: Path) -> None:
    """Mean area under the curve over epochs, every draw as a dot, of networks that were trained on the samples."""
    axes = new_axes(5.6, 3.4)
    for colour, name in zip(COLOURS, dict.fromkeys(row["score"] for row in rows), strict=False):
        chosen = [row for row in rows if row["score"] == name and row["samples"] == "seen"]
        means = [np.mean([row["auroc"] for row in chosen if row["epoch"] == epoch]) for epoch in epochs]
        axes.plot(range(len(epochs)), means, color=colour, label=name)
        places = [epochs.index(row["epoch"]) for row in chosen]
        axes.plot(places, [row["auroc"] for row in chosen], ".", color=colour, markersize=3)
    axes.set_xticks(range(len(epochs)), [f"epoch {epoch}" for epoch in epochs])
    axes.set_ylabel("AUROC of flipped labels")
    axes.legend(frameon=False, fontsize=8, loc="center left")
    save(axes, path, dpi=90)


def main() -> None:
    """Measure and write."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with the .npz files or torchvision's")
    options.add_argument("--images", type=int, default=5000, help="of a draw")
    options.add_argument("--seeds", type=int, default=5, help="draws")
    options.add_argument("--epochs", type=int, nargs="+", default=[1, 4, 30], help="when scores are taken")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        images, truth = sets.load(given.data, "fashion", "train").labelled()
    except (ValueError, FileNotFoundError) as error:
        options.error(str(error))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        start = time.perf_counter()
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: given.images]
        rows += draw(images[chosen].float().contiguous(), truth[chosen].long(), seed, sorted(given.epochs))
        print(f"draw {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    figure(rows, sorted(given.epochs), given.out / "audit.png")
    facts = {"images": given.images, "seeds": given.seeds, "epochs": sorted(given.epochs)}
    pages.save("audit", rows, packages=("torch", "numpy", "cleanlab"), folder=given.out, facts=facts)


if __name__ == "__main__":
    main()
