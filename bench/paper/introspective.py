"""Introspective learning: accuracy and calibration, feed-forward against introspective
(``python -m bench.paper.introspective``).

H, the published shape, is trained on the contrast rows of images that the network was trained on. The controls are
the same H on the features h alone, and temperature scaling for calibration. Each is repeated on top of networks
made robust in other ways.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import results_file
from bench.paper import data
from bench.paper.common import Options, finish, parallel, parse
from bench.paper.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bench.paper.figures import grouped_bars
from bench.paper.networks import Classifier
from bench.paper.train import HELD_OUT, Recipe, fit, train_all, trained
from fastgrad.challenges import fgsm
from fastgrad.challenges.pixels import PixelRange
from fastgrad.estimators import IntrospectiveClassifier
from fastgrad.metrics import calibration_report

TECHNIQUES = ("plain", "denoising", "adversarial training", "SimCLR", "noise augmentation", "AugMix")
#: Published accuracies under corruptions, feed-forward and introspective (Prabhushankar and AlRegib 2022).
PUBLISHED = {
    "plain": (67.89, 71.4),
    "denoising": (65.02, 68.86),
    "adversarial training": (68.02, 70.86),
    "SimCLR": (70.28, 73.32),
    "noise augmentation": (76.86, 77.98),
    "AugMix": (89.85, 89.89),
}
METHODS = ("feed-forward", "temperature", "introspective", "H on h (control)")


class Denoised(nn.Module):
    """A 3x3 median filter before the network."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.fc = model, model.fc

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features of the filtered image."""
        patches = F.unfold(F.pad(x, (1,) * 4, mode="replicate"), 3)
        median = patches.view(len(x), x.shape[1], 9, -1).median(2).values
        return self.model.features(median.view_as(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the filtered image."""
        return self.fc(self.features(x))


def _noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    strength = 0.15 * torch.rand(len(x), 1, 1, 1)
    return (x + strength * torch.randn_like(x)).clamp(0, 1)


def _attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    pixels = PixelRange.of(x, clip=(0, 1))
    attacked = fgsm(model, x, 4 / 255, torch.Generator(), pixels=pixels)
    model.train()
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, attacked, x)


def _augmix(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from torchvision.transforms import v2

    mix = v2.AugMix()
    return torch.stack([mix((image * 255).to(torch.uint8)) for image in x]).float() / 255


CHANGES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "noise augmentation": _noise,
    "adversarial training": _attack,
    "AugMix": _augmix,
}


def contrastive(model: Classifier, images: Tensor, epochs: int, seed: int) -> None:
    """SimCLR (Chen et al. 2020): two views of an image attract each other; the backbone alone is trained."""
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[-1], (0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.RandomGrayscale(0.2),
        ]
    )
    torch.manual_seed(seed)
    width = model.fc.in_features
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    optimizer = torch.optim.SGD(
        [*model.parameters(), *head.parameters()], lr=0.03, momentum=0.9, weight_decay=5e-4
    )
    model.train()
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images)), 128):
            # One random view for every sixteen images: enough variety, a sixteenth of the calls.
            views = [torch.cat([view(part) for part in torch.split(images[index], 16)]) for _ in range(2)]
            z = F.normalize(head(model.features(torch.cat(views))), dim=1)
            similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
            partner = torch.arange(len(z)).roll(len(index))
            loss = F.cross_entropy(similar, partner)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def robust(technique: str, recipe: Recipe, options: Options, images: Tensor, labels: Tensor) -> nn.Module:
    """The network of a technique: the plain one fine-tuned, or with a filter before it. Cached."""
    model = trained(recipe, options.data, options.cache)
    if technique == "plain":
        return model
    if technique == "denoising":
        return Denoised(model).eval()
    epochs = 2 if options.quick else 20
    path = options.cache / f"{technique.replace(' ', '-')}-{epochs}-{len(images)}-{recipe.file()}"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(recipe.seed)
    if technique == "SimCLR":
        contrastive(model, images, epochs, recipe.seed)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in model.fc.parameters():
            parameter.requires_grad_(True)
    fit(model, images, labels, epochs=epochs, seed=recipe.seed, rate=0.05, change=CHANGES.get(technique))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    torch.save(model.state_dict(), path)
    return model.eval()


def read(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Features h and logits."""
    with torch.no_grad():
        h = torch.cat([model.features(part) for part in torch.split(images, 500)])
        return {"features": h.numpy(), "logits": model.fc(h).numpy()}


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of smallest negative log-likelihood, on a grid of factors of 1.05."""
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    grid = [1.05**power for power in range(-30, 50)]
    return min(grid, key=lambda t: float(F.cross_entropy(z / t, y)))


def evaluate(task: tuple[Recipe, Options]) -> list[dict[str, Any]]:
    """Accuracy and calibration of every method on every technique, for one network."""
    recipe, options = task
    start = time.perf_counter()
    seen_count, per_cell = (10_000, 100) if options.quick else (45_000, 10_000)
    seen = data.load(options.data, "cifar10", "train", seen_count)
    held = data.load(options.data, "cifar10", "train", 2000, -HELD_OUT)
    test = data.load(options.data, "cifar10", "test", 2000 if options.quick else 10_000)
    assert seen.labels is not None
    assert held.labels is not None
    assert test.labels is not None
    images, labels = seen.tensor(), torch.from_numpy(seen.labels)
    clean = test.tensor()
    cells = [
        corrupt(clean[:per_cell], name, severity, seed=recipe.seed)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    ]
    corrupted, corrupted_labels = torch.cat(cells), np.tile(test.labels[:per_cell], len(cells))
    rows = []
    for technique in TECHNIQUES:
        model = robust(technique, recipe, options, images, labels)
        train, held_out = read(model, images), read(model, held.tensor())
        epochs = 15 if options.quick else 100
        introspective = IntrospectiveClassifier(max_epochs=epochs, random_state=recipe.seed)
        introspective.fit(train, seen.labels)
        control = IntrospectiveClassifier(max_epochs=epochs, random_state=recipe.seed)
        control.fit(train["features"], seen.labels)
        scale = temperature(held_out["logits"], held.labels)
        for case, pictures, truth in (
            ("clean", clean, test.labels),
            ("corrupted", corrupted, corrupted_labels),
        ):
            found = read(model, pictures)
            z = torch.from_numpy(found["logits"]).double()
            probabilities = {
                "feed-forward": z.softmax(1).numpy(),
                "temperature": (z / scale).softmax(1).numpy(),
                "introspective": introspective.predict_proba(found),
                "H on h (control)": control.predict_proba(found["features"]),
            }
            for method, p in probabilities.items():
                report = calibration_report(np.asarray(p, np.float64), truth)
                rows.append(
                    {
                        "network": recipe.network,
                        "technique": technique,
                        "case": case,
                        "method": method,
                        **report,
                    }
                )
    print(f"introspective {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def run(options: Options) -> None:
    """Make the table."""
    recipes = [Recipe(seed=seed, epochs=options.epochs) for seed in range(options.seeds)]
    train_all(recipes, options.data, options.cache, options.workers)
    found = parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers)
    rows = []
    for same in zip(*found, strict=True):
        row = {key: same[0][key] for key in ("network", "technique", "case", "method")}
        for metric in ("accuracy", "ece", "nll", "brier"):
            values = [one[metric] for one in same]
            row[metric] = round(float(np.mean(values)), 4)
            row[f"{metric}_spread"] = round(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, 4)
        rows.append(row | {"seeds": len(same)})
    value = {(row["technique"], row["case"], row["method"]): row for row in rows}
    sections = []
    for case in ("clean", "corrupted"):
        lines = []
        for technique in TECHNIQUES:
            line = {"technique": technique}
            for method in METHODS:
                row = value[technique, case, method]
                line[method] = (
                    f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f} (ECE {row['ece']:.3f})"
                )
            if case == "corrupted":
                line["published gain"] = "{:.2f} to {:.2f}".format(*PUBLISHED[technique])
            lines.append(line)
        text = f"## {case}: accuracy in per cent and expected calibration error"
        sections.append((text, results_file.table(lines, {key: key for key in lines[0]})))
    axes = grouped_bars(
        {m: [value[technique, "corrupted", m]["accuracy"] for technique in TECHNIQUES] for m in METHODS},
        list(TECHNIQUES),
        errors={m: [value[t, "corrupted", m]["accuracy_spread"] for t in TECHNIQUES] for m in METHODS},
        label="accuracy under 19 corruptions",
    )
    finish(options, "introspective", "Introspective learning", rows, sections, axes)


if __name__ == "__main__":
    run(parse(__doc__ or ""))
