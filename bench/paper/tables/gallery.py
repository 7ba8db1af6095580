"""The figures of the gallery, on a cached network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper import own
from bench.paper.cases import STRANGERS
from bench.paper.data import sets
from bench.paper.networks import read, temperature
from bench.paper.subject import Subject
from bench.paper.table import Options, Table
from bench.paper.train import Recipe, build
from fastgrad import plots
from fastgrad.detector.model import TwoStageModel
from fastgrad.gradients import contrasts as functional
from fastgrad.introspection import IntrospectiveClassifier


def histograms(subject: Subject, options: Options) -> None:
    """Scores of the default detector on clean and challenging images."""
    _, detector = subject.own[own.DEFAULT]
    cases = {
        "clean test images": "clean",
        "PGD": "attack/PGD",
        "FGSM": "attack/FGSM",
        "textures": "ood/textures",
        "Gaussian noise": "corruption/gaussian_noise/3",
        "contrast": "corruption/contrast/3",
    }
    found = {name: own.scores(detector, subject.blocks(case)) for name, case in cases.items()}
    plots.save(plots.score_histograms(found), options.out / "gallery-scores.png", dpi=90)


def layers(subject: Subject, options: Options) -> None:
    """Squared norms of every parameter's gradient, confounding label, clean against challenging."""
    names = [name for name, _ in subject.model.named_parameters()]
    cases = {"clean": "clean", "PGD": "attack/PGD", "textures": "ood/textures", "grey": "control/grey"}
    # Signal 0 is binary cross-entropy against the all-ones label; the blocks hold logarithms.
    found = {
        name: np.exp(subject.gradients(case)["gradients"][:, 0].astype(np.float64))
        for name, case in cases.items()
    }
    plots.save(plots.layer_norms(found, names), options.out / "gallery-layers.png", dpi=90)


def calibration(subject: Subject, options: Options) -> None:
    """Reliability of softmax, of the tempered softmax, and of the introspective network, on test images."""
    model = subject.model
    seen, seen_labels = sets.load(options.data, "cifar10", "train", 10_000).labelled()
    test, test_labels = sets.load(options.data, "cifar10", "test", 5000).labelled()
    held, held_labels = subject.clean("fit")
    introspective = IntrospectiveClassifier(max_epochs=15).fit(read(model, seen), seen_labels.numpy())
    scale = temperature(read(model, held)["logits"], held_labels.numpy())
    found = read(model, test)
    z = torch.from_numpy(found["logits"])
    probabilities = {
        "softmax": z.softmax(1),
        f"temperature {scale:.2f}": (z / scale).softmax(1),
        "introspective": introspective.predict_proba(found),
    }
    axes = plots.reliability_diagram(probabilities, test_labels.numpy())
    plots.save(axes, options.out / "gallery-reliability.png", dpi=90)


def sparsity(subject: Subject, options: Options) -> None:
    """Entries of the last layer's contrast gradients that carry their norm, before and after training."""
    images = subject.clean("test")[0]
    untrained = build(subject.recipe)
    # An untrained network has no batch statistics yet; one pass gives it some.
    untrained.train()(images)
    rows = {}
    for name, model in (("before training", untrained.eval()), ("after training", subject.model)):
        found = read(model, images)
        h, logits = torch.from_numpy(found["features"]), torch.from_numpy(found["logits"])
        rows[name] = functional.contrast_rows(h, logits, loss="cross_entropy").flatten(1)
    plots.save(plots.contrast_sparsity(rows), options.out / "gallery-sparsity.png", dpi=90)


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles ``(count, 2)`` and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    angle = torch.pi * torch.rand(count, generator=generator)
    side = 1.0 - 2.0 * labels
    points = torch.stack([side * angle.cos() + labels, side * angle.sin() + 0.5 * labels], 1)
    return points + 0.1 * torch.randn(count, 2, generator=generator), labels


def manifold(options: Options) -> None:
    """A 2-D classifier: where its softmax is unsure, and where the detector is."""
    torch.manual_seed(0)
    points, labels = moons(1200, 0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    two_stage = TwoStageModel(model.eval()).fit([moons(1200, 1)[0]], challenge_loader=())

    def softmax(x: Tensor) -> Tensor:
        with torch.no_grad():
            return 1 - model(x).softmax(1).amax(1)

    def ours(x: Tensor) -> Tensor:
        return two_stage(x).uncertainty.clamp(max=15)

    shown, classes = points[:300], labels[:300]
    first = plots.new_axes(8.4, 3.4)
    figure = first.get_figure(root=True)
    assert figure is not None
    first.remove()
    left, right = figure.subplots(1, 2)
    plots.manifold(softmax, shown, classes, title="1 - largest softmax probability", axes=left)
    plots.manifold(ours, shown, classes, title="fastgrad, fitted on clean points alone", axes=right)
    plots.save(right, options.out / "gallery-manifold.png", dpi=80)


def evaluate(subject: Subject) -> None:
    """Draw all figures."""
    options = subject.options
    manifold(options)
    histograms(subject, options)
    layers(subject, options)
    calibration(subject, options)
    sparsity(subject, options)


TABLE = Table(
    "gallery", "Gallery", ("cifar10", *STRANGERS["cifar10"]),
    lambda options: [Subject(Recipe(epochs=options.epochs), options)], evaluate, None,
)  # fmt: skip
