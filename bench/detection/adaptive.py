"""Attacks that know the detector: they seek an image that misleads the network *and* that the detector lets pass.

The white box is the detector's own computation, recorded as one graph whose results keep their derivatives. Two parts
have no useful derivative. P-values are counts, and the line between two counts gives their slope. Evidence is capped,
and the attack follows the uncapped sum (BPDA; Athalye, Carlini and Wagner, 2018). If the detector reads a backward
pass, the attack differentiates it a second time.

The attacks are: on the network alone (*unaware*; AutoAttack); on the margin less lambda times the detector's score;
and *selective* (see `attack`). The threshold flags a twentieth of clean photographs. An image is *protected* if every
one of its attacks fails or is found (Granese et al., MEAD, 2022).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection.data import sets
from bench.detection.experiment import PHOTOGRAPHS, SMALL, Experiment, Fit, Options
from bench.detection.methods_ours import fitted
from bench.detection.registry import NETWORKS
from bench.report.pages import printed
from fastgrad import TwoStageModel
from fastgrad._torch import flat_graph
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.detector.calibrate import values_of

#: Steps of each objective.
STEPS = 20
RADII = (2 / 255, 8 / 255)
#: The blocks of the attacked detectors.
FORMS: Mapping[str, Sequence[str]] = {"default": DEFAULT_BLOCKS, "second pass": (*DEFAULT_BLOCKS, "view")}
#: Weights of the detector's score beside the margin; None is selective.
LAMBDAS: Mapping[str, float | None] = {"lambda 0.1": 0.1, "lambda 1": 1.0, "selective": None}
DEFAULT_NETWORKS = ("lite0", "resnet20")
#: By kind of data, as photographs are slow: attacked images, random starts of each objective, images at a time.
EFFORTS = {PHOTOGRAPHS: (100, 5, 8), SMALL: (100, 5, 25)}
QUICK = {PHOTOGRAPHS: (8, 1, 8), SMALL: (25, 1, 25)}
#: What happens to images between the attack and the network.
WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {"": lambda images: images, " after JPEG": sets.compress}


class WhiteBox(NamedTuple):
    """Logits ``(B, N)`` and uncapped score ``(B,)`` with derivatives, the model itself, and its alarm threshold."""

    differentiable: Callable[[Tensor], tuple[Tensor, Tensor]]
    model: nn.Module
    threshold: float


def white_box(model: TwoStageModel, example: Tensor) -> WhiteBox:
    """Return the white box of a fitted model, without the operations that stop derivatives."""
    extraction, detector = model.extraction_, model.detector_

    def scores(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, blocks = extraction(x)
        return logits, detector.evidence(values_of(detector.scores, blocks)[0], cap=math.inf).sum(-1)

    graph = flat_graph(scores, example, functional=True)
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target in (aten.detach.default, aten.lift_fresh_copy.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    graph.requires_grad_(False)
    return WhiteBox(graph, model, model.threshold(0.05))


def unaware_of(model: nn.Module) -> WhiteBox:
    """Return the white box of the network alone: its detector never raises an alarm."""
    return WhiteBox(lambda x: (model(x), torch.zeros(len(x), dtype=torch.float64)), model, math.inf)


def away_from(logits: Tensor, predicted: Tensor) -> Tensor:
    """Return by how much the nearest other class leads over ``predicted``, ``(B,)``."""
    others = logits.scatter(1, predicted[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, predicted[:, None])[:, 0]


def attack(
    box: WhiteBox, images: Tensor, labels: Tensor, radius: float, weight: float | None, starts: int, seed: int
) -> Tensor:
    """Return for each of ``images`` in [0, 1] the most usual-looking one that misleads; the image itself if none does.

    Projected gradient steps on the sign (Madry et al., 2018), at most ``radius`` from each pixel; the best of several
    random starts counts. ``weight`` is the weight of the detector's score beside the margin. With 0 the attack is
    unaware of it. With None it follows the margin until the image misleads, then the score (Bryniarski et al., 2021).
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = images.clone(), torch.full((len(images),), math.inf, dtype=torch.float64)
    for _ in range(starts):
        start = torch.empty_like(images).uniform_(-radius, radius, generator=generator)
        x = (images + start).clamp(0, 1)
        for step in range(STEPS + 1):
            x.requires_grad_(True)
            logits, score = box.differentiable(x)
            towards = away_from(logits, labels).double()
            misled = (towards > 0).detach()
            selective = torch.where(misled, -score, towards)
            objective = selective if weight is None else towards - weight * score
            (gradient,) = torch.autograd.grad(objective.sum(), x)
            # For an attack that does not know the detector, the surest image counts, not the most usual one.
            value = -towards.detach() if weight == 0 else score.detach()
            better = misled & (value < least)
            least = torch.where(better, value, least)
            best[better] = x.detach()[better]
            # Steps shrink, so that the last ones settle between the two aims.
            size = 2.5 * radius / STEPS * (1.5 - step / STEPS)
            x = x.detach() + size * gradient.nan_to_num().sign()
            x = torch.maximum(torch.minimum(x, images + radius), images - radius).clamp(0, 1)
    return best


def auto_attack(model: nn.Module, images: Tensor, labels: Tensor, radius: float, seed: int) -> Tensor:
    """Run AutoAttack on the network alone, standard version (Croce and Hein, 2020), as its authors wrote it."""
    from pyautoattack import AutoAttack

    # It fails for other memory layouts.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    strongest = AutoAttack(model, eps=radius, norm="Linf", version="standard", seed=seed)
    return strongest.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))[0]


def measure(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Yield a row for each radius and detector: how many images mislead, how many of those are found."""
    count, starts, batch = (QUICK if experiment.options.quick else EFFORTS)[experiment.kind]
    fit, model = Fit(experiment), experiment.model
    # A second pass over photographs would take hours.
    forms = [form for form in FORMS if not (experiment.few and form == "second pass")]
    x, labels = (value[experiment.right["test"][:count]] for value in experiment.parts["test"])
    boxes = {form: white_box(fitted(fit, FORMS[form]), x[:3]) for form in forms}

    def every(make: Callable[..., Tensor], seen: Any, *settings: Any) -> Tensor:
        parts = zip(x.split(batch), labels.split(batch), strict=True)
        return torch.cat([make(seen, *part, *settings, seed=seed) for seed, part in enumerate(parts)])

    def answers(box: WhiteBox, images: Tensor) -> tuple[Tensor, Tensor]:
        found = [box.model(part) for part in images.split(batch)]
        return torch.cat([one.logits for one in found]), torch.cat([one.uncertainty for one in found])

    for radius in RADII:
        # Attacks that do not depend on the detector are made once.
        shared = {"unaware": every(attack, unaware_of(model), radius, 0.0, starts)}
        try:
            shared["AutoAttack"] = every(auto_attack, model, radius)
        except ModuleNotFoundError as absent:
            print(f"AutoAttack is not run: {absent}", file=sys.stderr)
        for form, box in boxes.items():
            made = shared | {name: every(attack, box, radius, weight, starts) for name, weight in LAMBDAS.items()}
            row: dict[str, Any] = {"network": experiment.network, "case": f"{round(255 * radius)}/255", "method": form}
            row |= {"images": len(x), "starts": starts}
            for way, change in WAYS.items():
                safe = np.ones(len(x), dtype=bool)
                for name, attacked in made.items():
                    logits, uncertainty = answers(box, change(attacked))
                    misled = (logits.argmax(1) != labels).numpy()
                    found = (uncertainty > box.threshold).numpy()
                    row[f"misled, {name}{way}"] = int(misled.sum())
                    row[f"found, {name}{way}"] = int((misled & found).sum())
                    safe &= ~misled | found
                row["protected" + way] = float(safe.mean())
                row["alarms" + way] = float((answers(box, change(x))[1] > box.threshold).double().mean())
            yield row


def run(options: Options, networks: Sequence[str]) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    rows = printed(row for name in networks for row in measure(NETWORKS[name].make(options, 0)))
    about = {name: NETWORKS[name].title for name in networks}
    return rows, {"steps": STEPS, "quick": options.quick, "networks": about}
