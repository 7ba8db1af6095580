"""Find wrong labels by gradient norms, loss, confidence, EL2N and cleanlab: one in ten of Fashion-MNIST is flipped.

    python -m bench.audit --data FOLDER

A draw is a subset of the data, the flips, and the networks' initial weights. One network sees all samples and ranks its
own training set. Three more see two thirds each and rank the third that they have not seen. Cleanlab is made for this,
and the other scores are computed there, too. Every score is taken after several epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad
from bench.detection.data import sets
from bench.report import pages

CLASSES, FLIPPED, FOLDS = 10, 0.1, 3
#: Images of a draw, draws, and when scores are taken.
IMAGES, SEEDS, EPOCHS = 5000, 5, (1, 4, 30)
Scores = dict[str, NDArray[np.float64]]


def trained(images: Tensor, labels: Tensor) -> Iterator[tuple[int, nn.Module]]:
    """Yield a network after each of `EPOCHS`."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 25, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(1, EPOCHS[-1] + 1):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch in EPOCHS:
            yield epoch, model


def scores(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Return each method's scores of the samples; higher means more suspicious."""
    loader = list(zip(images.split(250), labels.split(250), strict=True))
    table = fastgrad.rank_samples(model, loader, verbose=False)
    last = fastgrad.rank_samples(model, loader, layers="5", verbose=False)
    with torch.no_grad():
        probabilities = torch.cat([model(x).double().softmax(1) for x in images.split(250)]).numpy()
    return {
        "GraNd": table.grand, "GraNd, last layer": last.grand, "EL2N": table.el2n, "loss": table.loss,
        "confidence": 1 - probabilities.max(1), "probabilities": probabilities,
    }  # fmt: skip


def draw(images: Tensor, truth: Tensor, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every score, epoch and way of training of one draw."""
    torch.manual_seed(seed)
    wrong = torch.rand(len(truth)) < FLIPPED
    labels = torch.where(wrong, (truth + torch.randint(1, CLASSES, truth.shape)) % CLASSES, truth)
    flipped = wrong.numpy()
    found: dict[tuple[str, int], Scores] = {}
    for epoch, model in trained(images, labels):
        found["seen", epoch] = scores(model, images, labels)
    fold = torch.randperm(len(truth)) % FOLDS
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        for epoch, model in trained(images[inside], labels[inside]):
            for name, values in scores(model, images[outside], labels[outside]).items():
                whole = found.setdefault(("unseen", epoch), {})
                whole.setdefault(name, np.empty((len(truth), *values.shape[1:])))[outside.numpy()] = values
    for (samples, epoch), columns in found.items():
        probabilities = columns.pop("probabilities")
        # Higher label quality means less suspicious.
        quality = get_label_quality_scores(labels.numpy(), probabilities, method="normalized_margin")
        columns["cleanlab"] = 1 - np.asarray(quality)
        answers = probabilities.argmax(1)
        for name, values in columns.items():
            first = np.argsort(-values)[: flipped.sum()]
            yield {
                "seed": seed, "samples": samples, "epoch": epoch, "score": name,
                "auroc": float(roc_auc_score(flipped, values)), "precision": float(flipped[first].mean()),
                "accuracy": float((answers == truth.numpy()).mean()),
                "learnt": float((answers == labels.numpy())[flipped].mean()),
            }  # fmt: skip


def measure(data: Path) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    images, truth = sets.load(data, "fashion", "train").labelled()
    for seed in range(SEEDS):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        yield from draw(images[chosen].contiguous(), truth[chosen], seed)


if __name__ == "__main__":
    pages.command(
        "audit", __doc__, measure, packages=("torch", "numpy", "cleanlab"),
        facts={"images": IMAGES, "seeds": SEEDS, "epochs": EPOCHS},
        data={"type": Path, "required": True, "help": "folder with the .npz files or torchvision's"},
    )  # fmt: skip
