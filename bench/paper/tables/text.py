"""A text classifier: the default detector beside published ones, and where a transformer's channels say most.

Challenges are generated for images only, so the detectors here are fitted on clean news alone. Which layers are read is
varied for the blocks of channels: every layer that multiplies (what `fastgrad.blocks` takes), the outputs of layer
norms, of the attention, of the first and of the second layer of the feed-forward part, or of all linear layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.paper.figures import grouped_bars
from bench.paper.rows import Found, Rows, detection_rows, pivot
from bench.paper.table import Options, Page, Table
from bench.paper.texts import CASES, News, batches
from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.blocks import Activations, BiasGradients, Block
from fastgrad.blocks.channels import Channels
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import watch
from fastgrad.metrics import auroc

Scores = NDArray[np.float64]
#: Which modules of a BERT each choice of sites reads; None for the package's own.
SITES: dict[str, Callable[[str], bool] | None] = {
    "every layer (default)": None,
    "layer norms": lambda path: path.endswith("LayerNorm"),
    "attention's output": lambda path: path.endswith("attention.output.dense"),
    "feed-forward, hidden": lambda path: path.endswith("intermediate.dense"),
    "feed-forward, output": lambda path: path.endswith("output.dense") and "attention" not in path,
    "all linear layers": lambda path: "encoder" in path and path.endswith(("dense", "query", "key", "value")),
}


def subjects(options: Options) -> list[News]:
    """One network and split for each seed."""
    return [News(options.data, options.cache, seed) for seed in range(options.seeds)]


def _every(extraction: Extraction, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    parts = [extraction(batch) for batch in batches(inputs)]
    logits = torch.cat([own for own, _ in parts])
    return logits, {name: torch.cat([found[name] for _, found in parts]) for name in parts[0][1]}


def published(news: News) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Detectors of pytorch-ood that read logits and h, fitted on the news that the network was trained on."""
    from pytorch_ood.detector import GEN, KNN, EnergyBased, Mahalanobis, MaxSoftmax, ViM

    inputs, labels = news.news("train")
    extraction = Extraction(news.model, [])
    rows = [extraction.plain(batch)[1] for batch in batches(inputs)]
    h = torch.cat([row for row in rows if row is not None])
    head: Any = news.model.classifier
    weight, bias = head.weight.detach(), head.bias.detach()
    vim, knn, mahalanobis = ViM(None, h.shape[1] // 2, weight, bias), KNN(None), Mahalanobis(None)
    for detector in (vim, knn, mahalanobis):
        detector.fit_features(h, labels)
    return {
        "softmax": lambda z, _: MaxSoftmax.score(z),
        "energy": lambda z, _: EnergyBased.score(z),
        "GEN": lambda z, _: GEN.score(z),
        "KNN": lambda _, h: knn.predict_features(h),
        "ViM": lambda _, h: vim.predict_features(h),
        "Mahalanobis": lambda _, h: mahalanobis.predict_features(h),
    }


def evaluate(news: News) -> tuple[Found, dict[str, Any]]:
    """AUROC of every method on every case, and the network's accuracy and the detector's blocks."""
    inputs, labels = news.news("test")
    fit, calibration = (news.news(part)[0] for part in ("fit", "calibration"))
    cases = {name: news.case(name) for name in CASES}
    found: Found = {}

    def compare(method: str, score: Callable[[dict[str, Tensor]], Scores]) -> None:
        clean = score(inputs)
        for name, case in cases.items():
            found["BERT on news", name, method] = auroc(clean, score(case))

    model = TwoStageModel(news.model).fit(batches(fit), (), calibration_loader=batches(calibration))

    def ours(case: dict[str, Tensor]) -> Scores:
        return torch.cat([model(batch).uncertainty for batch in batches(case)]).double().numpy()

    compare("fastgrad", ours)
    plain = Extraction(news.model, [])

    def outputs(case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        parts = [plain.plain(batch) for batch in batches(case)]
        return torch.cat([z for z, _ in parts]), torch.cat([h for _, h in parts if h is not None])

    for method, score in published(news).items():
        compare(method, lambda case, score=score: score(*outputs(case)).double().numpy())  # type: ignore[misc]
    subject = watch(news.model, (), {name: value[:3] for name, value in inputs.items()})
    for sites, chosen in SITES.items():
        places = [
            Channels(path, -1, module.weight.shape[0], 0.0)
            for path, module in news.model.named_modules()
            if chosen is not None and chosen(path)
        ]
        known = subject if chosen is None else dataclasses.replace(subject, channels=_deep(places, subject))
        compare(f"activations: {sites}", _of_block(news, known, Activations(), fit, calibration))
    compare(
        "bias gradients: every layer (default)", _of_block(news, subject, BiasGradients(), fit, calibration)
    )
    right = torch.cat([model(batch).logits for batch in batches(inputs)]).argmax(1) == labels
    return found, {"accuracy": float(right.float().mean()), "kept": model.report().kept}


def _deep(places: Sequence[Channels], subject: Any) -> tuple[Channels, ...]:
    """The places with their depths, from the first one's that the package reads to the last one's in equal steps."""
    low, high = subject.channels[0].depth, subject.channels[-1].depth
    steps = np.linspace(low, high, len(places))
    return tuple(
        dataclasses.replace(place, depth=float(depth)) for place, depth in zip(places, steps, strict=True)
    )


def _of_block(
    news: News, subject: Any, block: Block, fit: dict[str, Tensor], calibration: dict[str, Tensor]
) -> Callable[[dict[str, Tensor]], Scores]:
    """The one-class score of one block alone."""
    extraction = Extraction(news.model, [block])
    extraction.known = subject
    parts = [_every(extraction, own)[1] for own in (fit, calibration)]
    X = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    held_out = np.arange(len(X[block.name])) >= len(parts[0][block.name])
    detector = UncertaintyDetector(log=False).fit(X, held_out=held_out)
    return lambda case: detector.decision_function(_every(extraction, case)[1])


def write(options: Options, subjects: Sequence[News], found: Sequence[tuple[Found, dict[str, Any]]]) -> Page:
    """Methods by cases."""
    rows: Rows = detection_rows([own for own, _ in found])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    first = [method for method in methods if ":" not in method]
    accuracy = [about["accuracy"] for _, about in found]
    kept = "; ".join(sorted({", ".join(about["kept"]) for _, about in found}))
    sections = [
        (
            "AUROC in hundredths of 1,000 news against 300 texts of each kind, means over networks and splits, ± "
            f"standard deviation between them. The network classifies {100 * np.mean(accuracy):.1f} % of the test news "
            f"rightly. The default budget of 1.2 keeps {kept}.",
            pivot(rows, CASES, first),
        ),
        (
            "Where a transformer's channels are read: the one-class score of one block alone.",
            pivot(rows, CASES, [method for method in methods if ":" in method]),
        ),
    ]
    means = {(row["case"], row["method"]): row["auroc"] for row in rows}
    bars = {method: [means[case, method] for case in CASES] for method in first}
    extra: Rows = [{"network": "BERT on news", "accuracy": round(value, 4)} for value in accuracy]
    return Page([*rows, *extra], sections, grouped_bars(bars, CASES))


TABLE = Table("text", "A text classifier and texts that it does not know", (), subjects, evaluate, write)
