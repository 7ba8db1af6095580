"""Out-of-distribution detection: digits and colour images."""

from __future__ import annotations

from collections.abc import Sequence

from bench.paper import detectors, own
from bench.paper.cases import STRANGERS
from bench.paper.figures import detection_bars
from bench.paper.rows import Found, detection_rows, pivot, precision
from bench.paper.subject import Subject, both_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import Recipe

METHODS = (
    *own.NAMES, *detectors.ONE_CLASS, "softmax", "energy", "GEN", "KNN", "ViM", "Mahalanobis", "ReAct", "SCALE",
    "fDBD", "GradNorm",
)  # fmt: skip
#: SVHN is grey in the collection at hand; grey CIFAR-10 says what the missing colour alone gives away.
CONTROL, AGAINST_CONTROL = "grey cifar10 (control)", "svhn against grey cifar10"


def subjects(options: Options) -> list[Subject]:
    """Networks of digits, and both small networks of colour images, or the one network that was asked for."""
    if options.network:
        return both_networks(options)
    epochs = 2 if options.quick else 10
    digits = [Recipe("mnist", "resnet", seed, epochs=epochs) for seed in range(options.seeds)]
    return [Subject(recipe, options) for recipe in digits] + both_networks(options)


def evaluate(subject: Subject) -> Found:
    """AUROC of every method on every other set, for one network."""
    dataset = subject.recipe.dataset
    network = f"{dataset} {subject.recipe.network}"
    methods = detectors.Methods(detectors.from_clean(subject) | subject.published(METHODS))
    cases = {name: f"ood/{name}" for name in STRANGERS[dataset]}
    if dataset != "cifar10":
        return methods.compare(subject, network, cases)
    controlled = methods.compare(subject, network, {AGAINST_CONTROL: "ood/svhn"}, against="control/grey")
    return methods.compare(subject, network, cases | {CONTROL: "control/grey"}) | controlled


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Found]) -> Page:
    """A table for each network, and the control."""
    rows = detection_rows(found)
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        here = [row for row in rows if row["network"] == network]
        text = f"## {network}\n\n{precision(options.test, options.strangers)}"
        sections.append((text, pivot(here, STRANGERS[network.split()[0]], METHODS)))
        if network.startswith("cifar10"):
            text = (
                "The SVHN images are grey. Control: grey CIFAR-10 test images against colour ones, and SVHN "
                "against them."
            )
            sections.append((text, pivot(here, (CONTROL, AGAINST_CONTROL), METHODS)))
    networks = dict.fromkeys(row["network"] for row in rows)
    groups = [(network, case) for network in networks for case in STRANGERS[network.split()[0]]]
    shown = (own.DEFAULT, *detectors.ONE_CLASS, "KNN", "ViM", "energy", "softmax")
    return Page(rows, sections, detection_bars(rows, groups, shown))


TABLE = Table(
    "ood", "Out-of-distribution detection", ("cifar10", "mnist", *STRANGERS["cifar10"], *STRANGERS["mnist"]),
    subjects, evaluate, write, networks=True,
)  # fmt: skip
