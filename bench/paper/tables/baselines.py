"""Uncertainty baselines and what they cost.

Deep ensembles (Lakshminarayanan et al. 2017; five networks, variance of their probabilities) and DUQ (van Amersfoort
et al. 2020) beside the detectors of pytorch-ood, on attacks, other data sets and corruptions. The cost of a method
is its processor time for one batch, in forward passes of the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.harness import results_file
from bench.paper import detectors, published
from bench.paper.cases import CASES, MIXED, STRANGERS, short
from bench.paper.duq import trained_duq
from bench.paper.figures import grouped_bars
from bench.paper.networks import Classifier
from bench.paper.rows import Found, detection_rows, mean_rows, pivot
from bench.paper.subject import Subject, extract, residual_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import Recipe, trained

MEMBERS = 5
METHODS = (
    "fastgrad", "fastgrad one-class", "deep ensemble", "DUQ", "softmax", "energy", "ODIN", "GradNorm", "ViM", "KNN",
    "Mahalanobis V",
)  # fmt: skip


def members(options: Options) -> list[Subject]:
    """The networks of the ensemble."""
    return [Subject(Recipe(seed=seed, epochs=options.epochs), options) for seed in range(MEMBERS)]


def ensemble_variance(models: Sequence[Classifier], images: Tensor) -> np.ndarray:
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


def evaluate(subject: Subject) -> tuple[Found, dict[str, float]]:
    """AUROC of every method on every case for one network, and the methods' costs in forward passes."""
    options = subject.options
    models = [trained(member.recipe, options.data, options.cache) for member in members(options)]
    duq = trained_duq(subject.recipe, options, *((2, 10_000) if options.quick else (30, 45_000)))
    fitted = {"fastgrad": detectors.default(subject), "fastgrad one-class": detectors.one_class(subject)}
    own = {name: partial(detectors.scores, detector) for name, detector in fitted.items()}
    outputs = published.from_outputs(subject)
    inputs = published.from_images(subject) | {
        "deep ensemble": lambda images: ensemble_variance(models, images),
        "DUQ": lambda images: 1 - duq(images).detach().amax(1).double().numpy(),
    }
    methods = detectors.Methods(own | outputs, inputs)
    right = subject.correct("test")
    found = methods.compare(
        subject, subject.recipe.network, {short(case): case for case in CASES}, keep=right
    )
    batch = subject.clean("test")[0][:32]
    blocks = {name: values[:32] for name, values in subject.blocks("clean").items()}
    with torch.no_grad():
        forward = seconds(lambda: subject.model(batch), 10)
    cost = {name: seconds(lambda f=f: f(batch)) / forward for name, f in inputs.items()}
    cost |= {name: 1 + seconds(lambda f=f: f(blocks)) / forward for name, f in outputs.items()}
    whole = seconds(lambda: extract(subject.extraction, batch)) / forward
    cost |= {name: whole + seconds(lambda f=f: f(blocks)) / forward for name, f in own.items()}
    return found, cost


def write(
    options: Options, subjects: Sequence[Subject], found: Sequence[tuple[Found, dict[str, float]]]
) -> Page:
    """Methods by cases, and what they cost."""
    rows = detection_rows([mapping for mapping, _ in found])
    costs = [
        {"network": "resnet", "method": method,
         "forward_passes": round(float(np.median([cost[method] for _, cost in found])), 1)}
        for method in METHODS
    ]  # fmt: skip
    sections = [
        ("", pivot(rows, [short(case) for case in CASES], METHODS)),
        (
            "Processor time for 32 images, in forward passes of the network (a backward pass is about two). "
            f"The ensemble also trains {MEMBERS} networks and DUQ its own.",
            results_file.table(costs, {"method": "method", "forward_passes": "forward passes"}),
        ),
    ]
    groups = {name: [short(case) for case in cases] for name, cases in MIXED.items()}
    means = {(row["case"], row["method"]): row["auroc"] for row in mean_rows(rows, groups)}
    shown = {method: [means[group, method] for group in groups] for method in METHODS[:7]}
    return Page(rows + costs, sections, grouped_bars(shown, list(groups)))


TABLE = Table(
    "baselines", "Uncertainty baselines", ("cifar10", *STRANGERS["cifar10"]), residual_networks, evaluate, write,
    needed=members,
)  # fmt: skip
