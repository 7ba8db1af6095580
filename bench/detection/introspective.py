"""Introspective learning: accuracy and calibration of the network, of H on its contrast rows, and of H on h.

    python -m bench.detection.introspective --network resnet18 --data DIR --cache CACHE

H is trained on images that the network was trained on. The controls are the same H on the features h alone, and
temperature scaling of every method. Each is repeated on networks made robust in other ways (`bench.detection.robust`);
those that train another network run on the small one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from bench.detection import resampled
from bench.detection.architectures import read, temperature
from bench.detection.data import sets
from bench.detection.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bench.detection.registry import Options
from bench.detection.robust import TECHNIQUES, robust
from bench.detection.train import EPOCHS, HELD_OUT, Recipe
from bench.report import pages
from fastgrad.introspection import IntrospectiveClassifier
from fastgrad.metrics import calibration_report

BASE, OURS, CONTROL = "feed-forward", "introspective", "H on h (control)"
#: Of H on one network.
SEEDS = 3


def measure(recipe: Recipe, options: Options, techniques: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a row for each technique, case and method, and what H on contrasts gains, with intervals."""
    count, per_cell = (10_000, 100) if options.quick else (45_000, 10_000)
    images, labels = sets.load(options.data, "cifar10", "train", count).labelled()
    held, held_labels = sets.load(options.data, "cifar10", "train", 2000, -HELD_OUT).labelled()
    clean, truth = sets.load(options.data, "cifar10", "test", 2000 if options.quick else 10_000).labelled()
    kinds = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    cells = [corrupt(clean[:per_cell], name, severity, seed=recipe.seed) for name, severity in kinds]
    cases = {
        "clean": (clean, truth.numpy()),
        "corrupted": (torch.cat(cells), np.tile(truth[:per_cell].numpy(), len(cells))),
    }
    rows: list[dict[str, Any]] = []
    for technique in techniques:
        start = time.perf_counter()
        model = robust(technique, recipe, options, images, labels)
        train, held_out = read(model, images), read(model, held)
        outputs = {case: read(model, pictures) for case, (pictures, _) in cases.items()}
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        right: dict[tuple[str, str], list[NDArray[np.bool_]]] = {}
        for seed in range(SEEDS):
            ours, control = (
                IntrospectiveClassifier(max_epochs=15 if options.quick else 100, random_state=seed).fit(
                    x, labels.numpy()
                )
                for x in (train, train["features"])
            )
            scales = {
                name: temperature(z, held_labels.numpy())
                for name, z in _logits(held_out, ours, control).items()
            }
            for case, (_, known) in cases.items():
                for name, z in _logits(outputs[case], ours, control).items():
                    for after, scale in (("", 1.0), (", temperature", scales[name])):
                        p = softmax(z / scale, axis=1)
                        found.setdefault((case, name + after), []).append(calibration_report(p, known))
                        right.setdefault((case, name + after), []).append(p.argmax(1) == known)
        for (case, method), reports in found.items():
            row: dict[str, Any] = {
                "network": recipe.network,
                "technique": technique,
                "case": case,
                "method": method,
            }
            for metric in ("accuracy", "ece", "nll", "brier"):
                values = [report[metric] for report in reports]
                row[metric], row[f"{metric}_spread"] = (
                    round(np.mean(values), 4),
                    round(np.std(values, ddof=1), 4),
                )
            if method == OURS:
                copies = 1 if case == "clean" else len(kinds)
                for other in (BASE, CONTROL):
                    gain = np.mean(right[case, OURS], 0) - np.mean(right[case, other], 0)
                    change = resampled.mean(gain.reshape(copies, -1).mean(0))
                    row[f"gain over {other}"] = [round(float(change[0]), 4), *resampled.interval(change)]
            rows.append(row | {"seeds": SEEDS})
        print(f"{technique}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def _logits(found: Any, ours: Any, control: Any) -> dict[str, NDArray[np.float64]]:
    """Of the network, and the logarithms of the probabilities of both H."""
    p = {OURS: ours.predict_proba(found), CONTROL: control.predict_proba(found["features"])}
    return {BASE: found["logits"].astype(np.float64)} | {
        name: np.log(np.maximum(values, 1e-30)) for name, values in p.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("detection-cache"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--network", choices=["resnet18", "densenet-bc", "resnet"], default="resnet18")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    recipe = Recipe(network=given.network, epochs=EPOCHS.get(given.network, 8))
    techniques = TECHNIQUES if given.network == "resnet" else TECHNIQUES[:2]
    rows = measure(recipe, Options(given.data, given.cache, given.quick), techniques)
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "imagecorruptions-imaug")
    name = (
        "introspective" + ("-small" if given.network == "resnet" else "") + ("-quick" if given.quick else "")
    )
    pages.save(name, rows, packages=packages, folder=given.out)


if __name__ == "__main__":
    main()
