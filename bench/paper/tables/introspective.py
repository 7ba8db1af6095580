"""Introspective learning: accuracy and calibration, feed-forward against introspective.

H, the published shape, is trained on the contrast rows of images that the network was trained on. The controls are
the same H on the features h alone, and temperature scaling, of every method, for calibration. Each is repeated on top
of networks made robust in other ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from bench import results_file
from bench.paper.cache import Arrays
from bench.paper.data import sets
from bench.paper.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bench.paper.figures import grouped_bars
from bench.paper.networks import read, temperature
from bench.paper.resampled import difference, interval, mean
from bench.paper.robust import TECHNIQUES, robust
from bench.paper.rows import Rows
from bench.paper.subject import Subject, residual_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import HELD_OUT
from fastgrad.introspection import IntrospectiveClassifier
from fastgrad.metrics import calibration_report

#: Published accuracies under corruptions, feed-forward and introspective (Prabhushankar and AlRegib 2022).
PUBLISHED = {
    "plain": (67.89, 71.4),
    "denoising": (65.02, 68.86),
    "adversarial training": (68.02, 70.86),
    "SimCLR": (70.28, 73.32),
    "noise augmentation": (76.86, 77.98),
    "AugMix": (89.85, 89.89),
}
BASE, OURS, CONTROL = "feed-forward", "introspective", "H on h (control)"
METHODS = tuple(name + after for after in ("", ", temperature") for name in (BASE, OURS, CONTROL))
#: Of H, on a network of the literature, of which there is one.
SEEDS = 3


def techniques(options: Options) -> tuple[str, ...]:
    """On a network of the literature those that train no other."""
    return TECHNIQUES[:2] if options.network else TECHNIQUES


def evaluate(subject: Subject) -> list[Rows]:
    """Accuracy and calibration of every method on every technique, for one network and each H on it."""
    recipe, options = subject.recipe, subject.options
    seen_count, per_cell = (10_000, 100) if options.quick else (45_000, 10_000)
    images, labels = sets.load(options.data, "cifar10", "train", seen_count).labelled()
    held, held_labels = sets.load(options.data, "cifar10", "train", 2000, -HELD_OUT).labelled()
    clean, truth = sets.load(options.data, "cifar10", "test", 2000 if options.quick else 10_000).labelled()
    cells = [
        corrupt(clean[:per_cell], name, severity, seed=recipe.seed)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    ]
    cases = {
        "clean": (clean, truth.numpy()),
        "corrupted": (torch.cat(cells), np.tile(truth[:per_cell].numpy(), len(cells))),
    }
    epochs = 15 if options.quick else 100
    seeds = [recipe.seed + i for i in range(SEEDS if options.network else 1)]
    rows: list[Rows] = [[] for _ in seeds]
    for technique in techniques(options):
        model = robust(technique, recipe, options, images, labels)
        train, held_out = read(model, images), read(model, held)
        outputs = {case: read(model, pictures) for case, (pictures, _) in cases.items()}
        for own, seed in zip(rows, seeds, strict=True):
            ours, control = (
                IntrospectiveClassifier(max_epochs=epochs, random_state=seed).fit(read_by, labels.numpy())
                for read_by in (train, train["features"])
            )
            scales = {
                name: temperature(z, held_labels.numpy())
                for name, z in _logits(held_out, ours, control).items()
            }
            for case, (_, known) in cases.items():
                row = {"network": recipe.network, "technique": technique, "case": case}
                for name, z in _logits(outputs[case], ours, control).items():
                    for after, scale in (("", 1.0), (", temperature", scales[name])):
                        p = softmax(z / scale, axis=1)
                        own.append(row | {"method": name + after} | calibration_report(p, known))
                        own[-1]["right"] = p.argmax(1) == known
    return rows


def _logits(
    found: Arrays, ours: IntrospectiveClassifier, control: IntrospectiveClassifier
) -> dict[str, NDArray[np.float64]]:
    """Of the network, and the logarithms of the probabilities of both H."""
    p = {OURS: ours.predict_proba(found), CONTROL: control.predict_proba(found["features"])}
    return {BASE: found["logits"].astype(np.float64)} | {
        name: np.log(np.maximum(values, 1e-30)) for name, values in p.items()
    }


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Sequence[Rows]]) -> Page:
    """Clean and corrupted, techniques by methods, and what introspection adds, with intervals."""
    every = [own for one in found for own in one]
    rows: Rows = []
    right: dict[tuple[str, str, str], np.ndarray] = {}
    for same in zip(*every, strict=True):
        row = {key: same[0][key] for key in ("network", "technique", "case", "method")}
        right[row["technique"], row["case"], row["method"]] = np.mean([one["right"] for one in same], 0)
        for metric in ("accuracy", "ece", "nll", "brier"):
            values = [one[metric] for one in same]
            row[metric] = round(float(np.mean(values)), 4)
            row[f"{metric}_spread"] = round(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, 4)
        rows.append(row | {"seeds": len(same)})
    value = {(row["technique"], row["case"], row["method"]): row for row in rows}
    used = techniques(options)
    sections = [(_about(options, subjects), "")]
    for case in ("clean", "corrupted"):
        lines = []
        for technique in used:
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
        sections.append((text, results_file.table(lines)))
    lines = []
    copies = {"clean": 1, "corrupted": len(CORRUPTIONS) * len(SEVERITIES)}
    for technique in used:
        for case in copies:
            line = {"technique": technique, "case": case}
            for other in (BASE, CONTROL):
                gain = right[technique, case, OURS] - right[technique, case, other]
                change = mean(gain.reshape(copies[case], -1).mean(0))
                line[f"over {other}"] = difference(100 * change, 2)
                value[technique, case, OURS][f"gain over {other}"] = [round(change[0], 4), *interval(change)]
            lines.append(line)
    text = (
        "## What introspection adds to accuracy, in per cent of the images, with 95 % intervals over resampled images "
        "(all corrupted copies of an image are drawn together); *none* where the interval holds zero"
    )
    sections.append((text, results_file.table(lines)))
    axes = grouped_bars(
        {m: [value[technique, "corrupted", m]["accuracy"] for technique in used] for m in METHODS[:3]},
        list(used),
        errors={m: [value[t, "corrupted", m]["accuracy_spread"] for t in used] for m in METHODS[:3]},
        label="accuracy under 19 corruptions",
    )
    return Page(rows, sections, axes)


def _about(options: Options, subjects: Sequence[Subject]) -> str:
    of = (
        f"{SEEDS} of H on one network"
        if options.network
        else f"{len(subjects)} networks, each with an H of its own"
    )
    return (
        f"Means and standard deviations over {of}. *temperature*: the logits, or logarithms of H's probabilities, over "
        "the temperature of smallest negative log-likelihood on held-out clean images."
    )


TABLE = Table(
    "introspective", "Introspective learning", ("cifar10",), residual_networks, evaluate, write, networks=True
)
