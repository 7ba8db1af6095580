"""Introspection where it gains: a second answer from what the last layer reads, trained on generated challenges.

*Correction* is that of `TwoStageModel`, whose zero is the network alone. H learns the clean image's label from clean
images and from challenges made from them. Its answer joins the network's by the gate of `TwoStageModel`, which is the
probability that the image is a challenge; by their mean; or not at all. Baselines are the last layer trained again on
the same images, and batch norm with adapted statistics.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bench.detection import recipes, resampled
from bench.detection.cases import ALIKE, FAMILIAR, FAMILIAR_TEXTS, FOREIGN, UNALIKE
from bench.detection.data import sets
from bench.detection.experiment import BATCH, SMALL, TEXTS, Experiment, Fit, Options, Seen
from bench.detection.methods_ours import blocks_of, fitted
from bench.detection.networks import unseen
from bench.detection.registry import NETWORKS
from bench.detection.runner import ABSENT
from bench.detection.train import HELD_OUT, fit_layer
from fastgrad import IntrospectiveClassifier, TwoStageModel, contrast_sqnorm
from fastgrad.batches import take
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.introspection.correction import mixed
from fastgrad.metrics import ece
from fastgrad.scores.temperature import Temperature

#: Splits of images that the network was not trained on, clean images of each, clean test images, images of each kind.
SIZES, QUICK = (3, 4000, 1000, 200), (1, 1000, 500, 60)
NETWORK = "network"
#: What H reads, and on how many images it is trained, was chosen on the first.
DEFAULT_NETWORKS = ("resnet20", "resnet18", "resnet56", "densenet", "vit", recipes.NETWORK, "kinds", "news")
Answers = dict[str, dict[str, Tensor]]


def reads(values: Mapping[str, Tensor], layer: nn.Linear) -> dict[str, Any]:
    """Return by name the inputs that H may read; contrast rows are the published method's."""
    h, logits = values["features"], values["logits"]
    norms = contrast_sqnorm(h, logits, bias=layer.bias is not None, log=True)
    return {
        "h": h, "contrast rows": {"features": h, "logits": logits}, "contrast norms": norms,
        "h and contrast norms": torch.cat([h, norms], 1), "logits": logits,
    }  # fmt: skip


def retrained(layer: nn.Linear, h: Tensor, labels: Tensor, seed: int) -> nn.Linear:
    """Return a copy of the last layer, trained further on h."""
    torch.manual_seed(seed)
    own = copy.deepcopy(layer).requires_grad_(True)
    fit_layer(own, h, labels, epochs=30, rate=1e-3, batch=128)
    return own.requires_grad_(False)


@torch.no_grad()
def adapted(model: nn.Module, images: Tensor) -> Tensor:
    """Return probabilities with batch norm's statistics taken from ``images`` themselves (Schneider et al., 2020)."""
    own = copy.deepcopy(model)
    update_bn([images], own)
    return probabilities(own, images)


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(x).softmax(1) for x in images.split(BATCH)])


def second_logits(H: IntrospectiveClassifier, value: Any) -> Tensor:
    """Return H's logits ``(n, N)``."""
    return torch.from_numpy(H.decision_function(value))


def answered(experiment: Experiment, tests: Mapping[str, Seen], seed: int) -> Answers:
    """Return probabilities by method and case, for all methods fitted on one split."""
    fit = Fit(experiment)
    # Detector, gate and correction are those of `TwoStageModel.fit`; H is trained below on each of its possible inputs.
    two_stage = fitted(fit, DEFAULT_BLOCKS, correct="always", challenges_per_input=3, max_samples=len(fit.clean.images))
    kept_by_default = two_stage.report().correction.startswith("kept:")
    kept = experiment.kept("inputs/generated/fit", dict)
    groups = torch.from_numpy(kept["groups"])
    labels = experiment.parts["fit"][1][groups]
    rows = blocks_of(experiment, "generated/fit", torch.from_numpy(kept["inputs"]), ("features", "logits"))
    # A fifth is kept to calibrate probabilities.
    apart = torch.rand(len(experiment.parts["fit"][1]), generator=torch.Generator().manual_seed(seed)) < 0.2
    trained, calibrating = ((~apart)[groups]).nonzero()[:, 0], apart[groups].nonzero()[:, 0]
    second: dict[str, tuple[IntrospectiveClassifier, Temperature]] = {}
    for name, value in reads(rows, experiment.layer).items():
        H = IntrospectiveClassifier(random_state=seed)
        H.fit(take(value, trained, len(groups)), labels[trained], sources=groups[trained])
        codes = torch.from_numpy(np.searchsorted(H.classes_, labels[calibrating].numpy()))
        second[name] = H, Temperature.fit(second_logits(H, take(value, calibrating, len(groups))), codes)
    again = retrained(experiment.layer, rows["features"][trained], labels[trained], seed)
    found: Answers = {}
    for case, seen in tests.items():
        values = blocks_of(seen.experiment, f"{case}/test", seen.images, (*DEFAULT_BLOCKS, "features"))
        first, odds = gated(two_stage, values)
        gate = odds.sigmoid().unsqueeze(1)
        found.setdefault(NETWORK, {})[case] = first
        logits = two_stage.temperature_(values["logits"])
        corrected = mixed(first.log(), two_stage.correction_(values["features"], logits), odds).exp()
        found.setdefault("correction, kept always", {})[case] = corrected
        found.setdefault("correction", {})[case] = corrected if kept_by_default else first
        read = reads(values, experiment.layer)
        answers = {
            f"H on {name}": temperature(second_logits(H, read[name])).softmax(1).float()
            for name, (H, temperature) in second.items()
        }
        answers["last layer, trained again"] = again(values["features"]).softmax(1)
        shares = {", gated": gate, ", mean": torch.full_like(gate, 0.5), "": torch.ones_like(gate)}
        for name, p in answers.items():
            for how, share in shares.items():
                found.setdefault(name + how, {})[case] = (1 - share) * first + share * p
    return found


@torch.no_grad()
def gated(two_stage: TwoStageModel, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the network's calibrated probabilities ``(n, N)``, and the log odds ``(n,)`` of a challenge."""
    odds = two_stage.gate_.log_odds(two_stage.detector_.explain(dict(values))[1])
    return two_stage.temperature_(values["logits"]).softmax(1).float(), odds.float()


def measure(options: Options, network: str, sizes: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Return a row for each method and group: accuracy and calibration error over splits, and the gain."""
    try:
        base = NETWORKS[network].make(options, 0)
    except ABSENT as why:
        return [{"network": network, "not run": str(why)}]
    seeds, count, tested, copies = sizes
    (images, labels), clean = base.parts["fit"], base.parts["test"]
    if base.kind == SMALL:
        images, labels = sets.load(options.data, "cifar10", unseen(network), HELD_OUT, -HELD_OUT).labelled()
        clean = sets.load(options.data, "cifar10", "test", tested).labelled()
    # Splits are of different images.
    count = min(count, len(images) * 4 // 5)
    base = replace(base, parts={"fit": (images[:count], labels[:count]), "test": clean}, count=copies)
    groups = {
        "clean": ("clean",),
        ALIKE: FAMILIAR_TEXTS if base.kind == TEXTS else FAMILIAR,
        UNALIKE: ("typos",) if base.kind == TEXTS else FOREIGN,
    }
    tests = {case: base.seen(case) for cases in groups.values() for case in cases}
    truth = {case: clean[1][seen.shown.source] for case, seen in tests.items()}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for seed in range(seeds):
        places = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        experiment = replace(base, draw=seed, parts={"fit": (images[places], labels[places]), "test": clean})
        for name, own in answered(experiment, tests, seed).items():
            found.setdefault(name, []).append(own)
        print(f"{network}, split {seed}", file=sys.stderr, flush=True)
    if any(isinstance(module, nn.BatchNorm2d) for module in base.model.modules()):
        found["batch norm adapted"] = [{case: adapted(base.model, seen.images) for case, seen in tests.items()}]
    for name in recipes.CHANGES if network == recipes.NETWORK else ():
        model = recipes.trained(name, options)
        found[name] = [{case: probabilities(model, seen.images) for case, seen in tests.items()}]
    rows = []
    right: dict[tuple[str, str], NDArray[np.float64]] = {}
    for name, splits in found.items():
        for group, cases in groups.items():
            known = np.concatenate([truth[case].numpy() for case in cases])
            row: dict[str, Any] = {"network": network, "method": name, "case": group}
            row |= {"fitted": count, "tested": len(clean[1])}
            answers = [torch.cat([own[case] for case in cases]).double().numpy() for own in splits]
            found_right = [one.argmax(1) == known for one in answers]
            figures = {"accuracy": np.mean(found_right, 1), "ece": [ece(one, known) for one in answers]}
            for metric, values in figures.items():
                row[metric] = round(float(np.mean(values)), 4)
                row[f"{metric} spread"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
            right[name, group] = np.mean(found_right, 0)
            gain = right[name, group] - right[NETWORK, group]
            # All copies of an image are drawn together.
            change = resampled.mean(gain.reshape(len(cases), -1).mean(0))
            rows.append(row | resampled.columns("gain", change))
    return rows


def run(options: Options, networks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sizes = QUICK if options.quick else SIZES
    rows = [row for name in networks for row in measure(options, name, sizes)]
    about = {name: [NETWORKS[name].title, NETWORKS[name].tuned] for name in DEFAULT_NETWORKS}
    facts = dict(zip(("splits", "fitted", "tested", "copies"), sizes, strict=True))
    return rows, facts | {"quick": options.quick, "networks": about}
