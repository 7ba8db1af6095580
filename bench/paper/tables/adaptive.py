"""Attacks that know the detector: they seek an image that misleads the network *and* that the detector lets pass.

The white box is the detector's own computation, recorded as one graph whose results keep their derivatives. Two parts
of it have none, or hide it: p-values are counted, and the line between two counts stands for their slope; what a score
may say is capped, and the attack follows the uncapped sum (BPDA; Athalye, Carlini and Wagner, 2018). Where the detector
reads a backward pass, the attack differentiates it a second time.

Attacks are projected gradient steps on the sign (Madry et al., 2018), with these objectives: the network's margin alone
(*unaware*); the margin less lambda times the detector's score; and the margin until the image misleads, from there on
the score (*selective*; Bryniarski et al., 2021). Of all steps of all restarts the image counts that misleads with the
lowest uncertainty. An image is *protected* if every one of its attacks either fails or is found (Granese et al., MEAD,
2022), at a threshold that flags a twentieth of clean photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.harness import results_file
from bench.paper.data import sets
from bench.paper.draws import AFTER, Draw
from bench.paper.figures import grouped_bars
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table
from fastgrad import TwoStageModel
from fastgrad.challenges.attacks import away_from
from fastgrad.engine.tracing import trace
from fastgrad.estimators.worth import USUAL
from fastgrad.scores.conformal import COMBINATIONS

#: What the attacked detectors read: the default, and what larger budgets allow.
FORMS: Mapping[str, tuple[str, ...]] = {
    "default": USUAL,
    "with view": (*USUAL, "view"),
    "with bias gradients": (*USUAL, "bias_gradients"),
}
RADII = (2 / 255, 8 / 255)
#: Weights of the detector's score beside the margin; 0 is unaware of it, None is selective.
LAMBDAS: Mapping[str, float | None] = {
    "unaware": 0.0,
    "lambda 0.1": 0.1,
    "lambda 1": 1.0,
    "selective": None,
}
FALSE_ALARMS = 0.05
#: Attacked photographs, steps and random starts of each objective, and images at a time.
IMAGES, STEPS, STARTS, _BATCH = 24, 20, 1, 8


class WhiteBox(NamedTuple):
    """What an attack sees of a detector.

    Attributes:
        differentiable: From images to logits ``(B, N)`` and the detector's uncapped score ``(B,)``.
        uncertainty: From images to what the detector answers.
        threshold: From which on it is an alarm.
    """

    differentiable: Callable[[Tensor], tuple[Tensor, Tensor]]
    uncertainty: Callable[[Tensor], tuple[Tensor, Tensor]]
    threshold: float


class Photographs(Draw):
    """A draw whose own cases are not needed: the attacks are made against each detector."""

    def prepare(self) -> None:
        """Nothing is kept."""


def white_box(model: TwoStageModel, example: Tensor) -> WhiteBox:
    """The graph of a fitted model with everything cut out that stops a derivative."""
    extraction, detector = model.extraction, model.detector_module
    assert extraction is not None
    assert detector is not None
    weights = [score.options["weight"] for score in detector.scores]

    def scores(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, blocks = extraction(x)
        evidence = torch.stack([score.evidence(score.raw(blocks)) for score in detector.scores], -1)
        return logits, COMBINATIONS[detector.options["combine"]](evidence, math.inf, weights)

    graph = trace(scores, (example,), len(example), functional=True)
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target in (aten.detach.default, aten.lift_fresh_copy.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    graph.requires_grad_(False)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        found = model(x)
        return found.logits, found.uncertainty

    return WhiteBox(graph, answer, model.threshold(FALSE_ALARMS))


def attack(
    box: WhiteBox, images: Tensor, labels: Tensor, radius: float, weight: float | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The most usual-looking image that misleads, for each of ``images`` ``(B, 3, H, W)`` in [0, 1].

    Returns:
        Images, and the uncapped score of each; infinite, with the image as it was, where none misleads.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = images.clone(), torch.full((len(images),), math.inf, dtype=torch.float64)
    for _ in range(STARTS):
        start = torch.empty_like(images).uniform_(-radius, radius, generator=generator)
        x = (images + start).clamp(0, 1)
        for step in range(STEPS + 1):
            x.requires_grad_(True)
            logits, score = box.differentiable(x)
            towards = away_from(logits, labels, nearest=True)
            misled = (towards > 0).detach()
            if weight is None:
                objective = torch.where(misled, -score, towards.double())
            else:
                objective = towards.double() - weight * score
            (gradient,) = torch.autograd.grad(objective.sum(), x)
            # Of an attack that does not know the detector, the surest image counts, not the most usual one.
            value = -towards.detach().double() if weight == 0 else score.detach()
            better = misled & (value < least)
            least = torch.where(better, value, least)
            best[better] = x.detach()[better]
            # Steps shrink, so that the last ones settle between the two aims.
            size = 2.5 * radius / STEPS * (1.5 - step / STEPS)
            x = x.detach() + size * gradient.nan_to_num().sign()
            x = torch.maximum(torch.minimum(x, images + radius), images - radius).clamp(0, 1)
    return best, least


def evaluate(draw: Draw) -> Rows:
    """For every form, radius and objective: how many images mislead, and how many of those are found."""
    x, labels = draw.clean("test")
    picked = np.flatnonzero(draw.right)[: min(IMAGES, draw.sizes.case)]
    x, labels = x[picked], labels[picked]
    fit, calibration = (
        [(part,) for part in draw.clean(name)[0].split(16)] for name in ("fit", "calibration")
    )
    rows: Rows = []
    for form, blocks in FORMS.items():
        model = TwoStageModel(draw.model, blocks=blocks).fit(
            fit, calibration_loader=calibration, seed=draw.number
        )
        box = white_box(model, x[:3])
        alarms = float((_answers(box, x)[1] > box.threshold).float().mean())
        for radius in RADII:
            for name, weight in LAMBDAS.items():
                parts = [
                    attack(box, part, own, radius, weight, seed)
                    for seed, (part, own) in enumerate(
                        zip(x.split(_BATCH), labels.split(_BATCH), strict=True)
                    )
                ]
                attacked = torch.cat([part[0] for part in parts])
                for after, images in (("", attacked), (AFTER, _compressed(attacked))):
                    logits, uncertainty = _answers(box, images)
                    misled = logits.argmax(1) != labels
                    rows.append(
                        {
                            "draw": draw.name, "form": form, "radius": round(255 * radius), "attack": name + after,
                            "images": len(x), "misled": misled.tolist(), "alarms": alarms,
                            "found": (uncertainty > box.threshold).tolist(),
                        }
                    )  # fmt: skip
    return rows


def _answers(box: WhiteBox, images: Tensor) -> tuple[Tensor, Tensor]:
    logits, uncertainty = zip(*(box.uncertainty(part) for part in images.split(_BATCH)), strict=True)
    return torch.cat(logits), torch.cat(uncertainty)


def _compressed(images: Tensor) -> Tensor:
    return sets.to_tensor(sets.jpeg(sets.to_bytes(images)))


def write(options: Options, subjects: Sequence[Draw], found: Sequence[Rows]) -> Page:
    """Shares of the misleading images that are found, and of the images that are protected."""
    attacked = [row for own in found for row in own]
    rows: Rows = []
    lines: list[dict[str, Any]] = []
    for form, radius in dict.fromkeys((row["form"], row["radius"]) for row in attacked):
        own = [row for row in attacked if (row["form"], row["radius"]) == (form, radius)]
        row: dict[str, Any] = {
            "case": f"{radius}/255",
            "method": form,
            "images": own[0]["images"] * len(subjects),
        }
        line = {"radius": row["case"], "detector": form}
        for name in dict.fromkeys(one["attack"] for one in own):
            misled, seen = _joined(own, name)
            row[f"misled, {name}"], row[f"found, {name}"] = int(misled.sum()), int((misled & seen).sum())
            line[name] = f"{row[f'found, {name}']} of {row[f'misled, {name}']}"
        for kept in ("", AFTER):
            pairs = [
                _joined(own, one["attack"]) for one in own if one["attack"].endswith(AFTER) == bool(kept)
            ]
            row["protected" + kept] = float(np.mean(np.all([~misled | seen for misled, seen in pairs], 0)))
        row["alarms"] = float(np.mean([one["alarms"] for one in own]))
        line |= {name: f"{row[name]:.2f}" for name in ("protected", "protected" + AFTER)}
        line["clean, flagged"] = f"{row['alarms']:.2f}"
        rows.append(row)
        lines.append(line)
    text = (
        f"EfficientNet-Lite0, {len(subjects)} draw, {rows[0]['images']} photographs that the network classifies "
        f"rightly; {STEPS} steps and {STARTS} random start for each objective. Of the attacked images that mislead "
        f"the network, how many the detector finds at a threshold that flags {FALSE_ALARMS:.0%} of clean photographs. "
        "*unaware*: the attack does not know the detector. *after JPEG*: the same images compressed (quality 75). "
        "*protected*: share of the photographs of which every attack fails or is found. *clean, flagged*: of the same "
        "photographs before the attack."
    )
    names = [(name, row["case"]) for name in LAMBDAS for row in rows if row["method"] == rows[0]["method"]]
    bars = {
        form: [
            _share(row, name)
            for name, case in names
            for row in rows
            if (row["method"], row["case"]) == (form, case)
        ]
        for form in dict.fromkeys(row["method"] for row in rows)
    }
    axes = grouped_bars(bars, [f"{name}, {case}" for name, case in names], label="share of attacks found")
    return Page(rows, [(text, results_file.table(lines))], axes)


def _share(row: Mapping[str, Any], name: str) -> float:
    return float(row[f"found, {name}"]) / max(1, row[f"misled, {name}"])


def _joined(rows: Rows, name: str) -> tuple[Any, Any]:
    """Over draws, which images mislead and which are found."""
    own = [row for row in rows if row["attack"] == name]
    return tuple(np.concatenate([np.array(row[key]) for row in own]) for key in ("misled", "found"))


TABLE = Table(
    "adaptive",
    "Attacks that know the detector",
    ("photographs",),
    lambda options: [Photographs(options.data, options.cache, 0)],
    evaluate,
    write,
)
