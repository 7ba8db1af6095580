"""Introspective learning: accuracy and calibration, feed-forward against introspective.

H, the published shape, is trained on the contrast rows of images that the network was trained on. The controls are
the same H on the features h alone, and temperature scaling for calibration. Each is repeated on top of networks
made robust in other ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.harness import results_file
from bench.paper.data import sets
from bench.paper.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bench.paper.figures import grouped_bars
from bench.paper.networks import read, temperature
from bench.paper.robust import TECHNIQUES, robust
from bench.paper.rows import Rows
from bench.paper.subject import Subject, residual_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import HELD_OUT
from fastgrad.estimators import IntrospectiveClassifier
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
METHODS = ("feed-forward", "temperature", "introspective", "H on h (control)")


def evaluate(subject: Subject) -> Rows:
    """Accuracy and calibration of every method on every technique, for one network."""
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
    rows = []
    for technique in TECHNIQUES:
        model = robust(technique, recipe, options, images, labels)
        train, held_out = read(model, images), read(model, held)
        epochs = 15 if options.quick else 100
        introspective = IntrospectiveClassifier(max_epochs=epochs, random_state=recipe.seed)
        introspective.fit(train, labels.numpy())
        control = IntrospectiveClassifier(max_epochs=epochs, random_state=recipe.seed)
        control.fit(train["features"], labels.numpy())
        scale = temperature(held_out["logits"], held_labels.numpy())
        for case, (pictures, known) in cases.items():
            found = read(model, pictures)
            z = torch.from_numpy(found["logits"]).double()
            probabilities = {
                "feed-forward": z.softmax(1).numpy(),
                "temperature": (z / scale).softmax(1).numpy(),
                "introspective": introspective.predict_proba(found),
                "H on h (control)": control.predict_proba(found["features"]),
            }
            for method, p in probabilities.items():
                row = {"network": recipe.network, "technique": technique, "case": case, "method": method}
                rows.append(row | calibration_report(np.asarray(p, np.float64), known))
    return rows


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Rows]) -> Page:
    """Clean and corrupted, techniques by methods."""
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
        sections.append((text, results_file.table(lines)))
    axes = grouped_bars(
        {m: [value[technique, "corrupted", m]["accuracy"] for technique in TECHNIQUES] for m in METHODS},
        list(TECHNIQUES),
        errors={m: [value[t, "corrupted", m]["accuracy_spread"] for t in TECHNIQUES] for m in METHODS},
        label="accuracy under 19 corruptions",
    )
    return Page(rows, sections, axes)


TABLE = Table("introspective", "Introspective learning", ("cifar10",), residual_networks, evaluate, write)
