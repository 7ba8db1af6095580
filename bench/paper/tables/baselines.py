"""Uncertainty baselines and what they cost.

Deep ensembles (Lakshminarayanan et al. 2017; five networks, variance of their probabilities) and DUQ (van Amersfoort
et al. 2020) beside the detectors of pytorch-ood, on attacks, other data sets and corruptions. The cost of a method
is its processor time for one batch, in forward passes of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import results_file
from bench.paper import detectors, own, published
from bench.paper.cases import CASES, MIXED, STRANGERS, short
from bench.paper.duq import trained_duq
from bench.paper.figures import grouped_bars
from bench.paper.networks import Classifier
from bench.paper.price import prices
from bench.paper.rows import Found, detection_rows, mean_rows, pivot
from bench.paper.subject import BATCH, Subject, residual_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import Recipe, trained

MEMBERS = 5
METHODS = (
    own.DEFAULT, detectors.ONE_CLASS[0], "deep ensemble", "DUQ", "softmax", "energy", "ODIN", "GradNorm", "ViM", "KNN",
    "Mahalanobis",
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


def evaluate(subject: Subject) -> tuple[Found, dict[str, float]]:
    """AUROC of every method on every case for one network, and the methods' costs in forward passes."""
    options = subject.options
    models = [trained(member.recipe, options.data, options.cache) for member in members(options)]
    duq = trained_duq(subject.recipe, options, *((2, 10_000) if options.quick else (30, 45_000)))
    (report, default), (lone_report, lone) = subject.own[own.DEFAULT], detectors.one_class(subject)
    movement = published.movements(subject.model, subject.clean("fit")[0][:BATCH], BATCH)
    inputs = {
        "ODIN": published.from_images(subject.model, torch.from_numpy(movement), BATCH)["ODIN"],
        "deep ensemble": lambda images: ensemble_variance(models, images),
        "DUQ": lambda images: 1 - duq(images).detach().amax(1).double().numpy(),
    }
    outputs = subject.published(METHODS)
    mine = {own.DEFAULT: partial(own.scores, default), detectors.ONE_CLASS[0]: partial(own.scores, lone)}
    methods = detectors.Methods(mine | outputs, inputs)
    right = subject.correct("test")
    found = methods.compare(
        subject, subject.recipe.network, {short(case): case for case in CASES}, keep=right
    )
    batch = subject.clean("test")[0][:BATCH]
    blocks = {name: values[:BATCH] for name, values in subject.blocks("clean").items()}
    cost = prices(subject.model, batch, {name: partial(score, batch) for name, score in inputs.items()})
    extra = prices(subject.model, batch, {name: partial(score, blocks) for name, score in outputs.items()})
    cost |= {name: 1 + price for name, price in extra.items()}
    for name, kept, detector in ((own.DEFAULT, report, default), (detectors.ONE_CLASS[0], lone_report, lone)):
        cost |= prices(subject.model, batch, {name: subject.reading.live(kept, detector)})
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
            f"Processor time for {BATCH} images, in forward passes of the network (a backward pass is about two). "
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
