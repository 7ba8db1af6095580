"""Uncertainty baselines and what they cost (``python -m bench.paper.baselines``).

Deep ensembles (Lakshminarayanan et al. 2017; five networks, variance of their probabilities) and DUQ (van Amersfoort
et al. 2020) beside the detectors of pytorch-ood, on attacks, other data sets and corruptions. The cost of a method
is its processor time for one batch, in forward passes of the network.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import results_file
from bench.paper import data, detectors
from bench.paper.common import Options, detection_rows, finish, parallel, parse, pivot
from bench.paper.figures import grouped_bars
from bench.paper.networks import Classifier
from bench.paper.subject import Subject, extract
from bench.paper.train import Recipe, augment_crop, train_all, trained
from bench.paper.transfer import CASES, short
from fastgrad.metrics import auroc

MEMBERS = 5
METHODS = (
    "fastgrad", "fastgrad one-class", "deep ensemble", "DUQ", "softmax", "energy", "ODIN", "GradNorm", "ViM", "KNN",
    "Mahalanobis V",
)  # fmt: skip


class DUQ(nn.Module):
    """Deterministic uncertainty quantification: an RBF kernel to one centroid per class in place of logits."""

    def __init__(self, backbone: Classifier, classes: int = 10, size: int = 64, length: float = 0.3) -> None:
        super().__init__()
        self.backbone, self.length = backbone, length
        width = backbone.fc.in_features
        self.weight = nn.Parameter(torch.randn(size, classes, width) / width**0.5)
        self.register_buffer("count", torch.full((classes,), 20.0))
        self.register_buffer("total", torch.randn(size, classes) * 20 * 0.05)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings ``(B, size, classes)``."""
        return torch.einsum("snd,bd->bsn", self.weight, self.backbone.features(x))

    def kernel(self, embedded: Tensor) -> Tensor:
        """Correlation with every class's centroid ``(B, classes)``, in (0, 1]."""
        square = (embedded - (self.total / self.count)).square().mean(1)
        return torch.exp(-square / (2 * self.length**2))

    @torch.no_grad()
    def update(self, embedded: Tensor, onehot: Tensor, momentum: float = 0.99) -> None:
        """Moving averages of the centroids."""
        self.count.mul_(momentum).add_((1 - momentum) * onehot.sum(0))
        self.total.mul_(momentum).add_((1 - momentum) * torch.einsum("bsn,bn->sn", embedded, onehot))

    def forward(self, x: Tensor) -> Tensor:
        """Kernel values ``(B, classes)``; uncertainty is one minus the largest."""
        return self.kernel(self.embed(x))


def trained_duq(recipe: Recipe, options: Options, epochs: int, images_used: int) -> DUQ:
    """DUQ with the two-sided gradient penalty, started from the trained network; cached."""
    model = DUQ(trained(recipe, options.data, options.cache))
    path = options.cache / f"duq-{epochs}-{images_used}-{recipe.file()}"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    split = data.load(options.data, recipe.dataset, "train", images_used)
    assert split.labels is not None
    images = split.tensor()
    labels = torch.from_numpy(split.labels)
    padded = F.pad(images, (3,) * 4, mode="reflect")
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        for index in torch.split(torch.randperm(len(images), generator=generator), 128):
            x = augment_crop(images, padded, index, generator).requires_grad_()
            onehot = F.one_hot(labels[index], 10).float()
            embedded = model.embed(x)
            values = model.kernel(embedded)
            loss = F.binary_cross_entropy(values.clamp(1e-6, 1 - 1e-6), onehot)
            (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            penalty = (slope.flatten(1).square().sum(1) - 1).square().mean()
            optimizer.zero_grad()
            (loss + 0.05 * penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            model.update(embedded.detach(), onehot)
    torch.save(model.state_dict(), path)
    return model.eval()


def ensemble_variance(models: list[Classifier], images: Tensor) -> np.ndarray:
    """Variance over the members of each class's probability, summed over classes."""
    with torch.no_grad():
        found = [
            torch.stack([model(part).softmax(1) for model in models]).var(0).sum(1)
            for part in torch.split(images, 256)
        ]
    return torch.cat(found).double().numpy()


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of one call, the smallest of some."""
    function()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def evaluate(task: tuple[Recipe, Options]) -> tuple[dict[tuple[str, str, str], float], dict[str, float]]:
    """AUROC of every method on every case for one network, and the methods' costs in forward passes."""
    recipe, options = task
    start = time.perf_counter()
    subject = Subject(recipe, options)
    model = subject.model
    members = [
        trained(Recipe(seed=seed, epochs=recipe.epochs), options.data, options.cache)
        for seed in range(MEMBERS)
    ]
    duq = trained_duq(recipe, options, *((2, 10_000) if options.quick else (30, 45_000)))
    fitted = {"fastgrad": detectors.default(subject), "fastgrad one-class": detectors.one_class(subject)}
    outputs = detectors.from_outputs(subject)
    inputs = detectors.from_images(subject) | {
        "deep ensemble": lambda images: ensemble_variance(members, images),
        "DUQ": lambda images: 1 - duq(images).detach().amax(1).double().numpy(),
    }
    right = subject.correct("test")

    def scores(case: str) -> dict[str, np.ndarray]:
        blocks, images = subject.blocks(case), subject.images(case)
        if case == "clean":
            blocks = {name: values[right] for name, values in blocks.items()}
            images = images[torch.from_numpy(right)]
        return (
            {name: detectors.scores(detector, blocks) for name, detector in fitted.items()}
            | {name: score(blocks) for name, score in outputs.items()}
            | {name: score(images) for name, score in inputs.items()}
        )

    clean = scores("clean")
    found = {
        (recipe.network, short(case), method): auroc(clean[method], values)
        for case in CASES
        for method, values in scores(case).items()
    }
    batch = subject.clean("test")[0][:32]
    blocks = {name: values[:32] for name, values in subject.blocks("clean").items()}
    with torch.no_grad():
        forward = seconds(lambda: model(batch), 10)
    cost = {name: seconds(lambda f=f: f(batch)) / forward for name, f in inputs.items()}
    cost |= {name: 1 + seconds(lambda f=f: f(blocks)) / forward for name, f in outputs.items()}
    whole = seconds(lambda: extract(subject.extraction, batch)) / forward
    cost |= {
        name: whole + seconds(lambda d=d: detectors.scores(d, blocks)) / forward for name, d in fitted.items()
    }
    print(f"baselines {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found, cost


def run(options: Options) -> None:
    """Make the table."""
    recipes = [Recipe(seed=seed, epochs=options.epochs) for seed in range(options.seeds)]
    members = [Recipe(seed=seed, epochs=options.epochs) for seed in range(MEMBERS)]
    train_all(list(dict.fromkeys([*recipes, *members])), options.data, options.cache, options.workers)
    found = parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers)
    rows = detection_rows([mapping for mapping, _ in found])
    names = [short(case) for case in CASES]
    costs = [
        {"method": method, "forward passes": round(float(np.median([cost[method] for _, cost in found])), 1)}
        for method in METHODS
    ]
    sections = [
        ("", pivot(rows, names, METHODS)),
        (
            "Processor time for 32 images, in forward passes of the network (a backward pass is about two). "
            f"The ensemble also trains {MEMBERS} networks and DUQ its own.",
            results_file.table(costs, {"method": "method", "forward passes": "forward passes"}),
        ),
    ]
    groups = {"attacks": names[:6], "other sets": names[6:10], "corruptions": names[10:]}
    axes = grouped_bars(
        {
            method: [
                float(np.mean([r["auroc"] for r in rows if r["method"] == method and r["case"] in cases]))
                for cases in groups.values()
            ]
            for method in METHODS[:7]
        },
        list(groups),
    )
    finish(options, "baselines", "Uncertainty baselines", rows + _cost_rows(costs), sections, axes)


def _cost_rows(costs: list[dict]) -> list[dict]:
    return [
        {"network": "resnet", "method": cost["method"], "forward_passes": cost["forward passes"]}
        for cost in costs
    ]


if __name__ == "__main__":
    run(parse(__doc__ or ""))
