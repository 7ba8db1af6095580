"""What an attack sees of a detector, and the attacks that use it.

The white box is the detector's own computation, recorded as one graph whose results keep their derivatives. Two parts
of it have none, or hide it: p-values are counted, and the line between two counts stands for their slope; what a score
may say is capped, and the attack follows the uncapped sum (BPDA; Athalye, Carlini and Wagner, 2018). Where the detector
reads a backward pass, the attack differentiates it a second time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrad import TwoStageModel
from fastgrad.engine.tracing import trace

#: Steps of each objective.
STEPS = 20


class WhiteBox(NamedTuple):
    """Logits ``(B, N)`` and uncapped score ``(B,)`` with derivatives; what answers; from where on it is an alarm."""

    differentiable: Callable[[Tensor], tuple[Tensor, Tensor]]
    model: nn.Module
    threshold: float


def white_box(model: TwoStageModel, example: Tensor, false_alarms: float) -> WhiteBox:
    """A fitted model's, with everything cut out that stops a derivative."""
    extraction, detector = model.extraction_, model.detector_

    def scores(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, blocks = extraction(x)
        return logits, detector.evidence(detector.raw(blocks), cap=math.inf).sum(-1)

    graph = trace(scores, (example,), len(example), functional=True)
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target in (aten.detach.default, aten.lift_fresh_copy.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    graph.requires_grad_(False)
    return WhiteBox(graph, model, model.threshold(false_alarms))


def unaware_of(model: nn.Module) -> WhiteBox:
    """The network's alone: a detector that says nothing."""
    return WhiteBox(lambda x: (model(x), torch.zeros(len(x), dtype=torch.float64)), model, math.inf)


def away_from(logits: Tensor, predicted: Tensor) -> Tensor:
    """Return by how much the nearest other class leads over ``predicted``, ``(B,)``."""
    others = logits.scatter(1, predicted[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, predicted[:, None])[:, 0]


def attack(
    box: WhiteBox, images: Tensor, labels: Tensor, radius: float, weight: float | None, starts: int, seed: int
) -> Tensor:
    """Return for each of ``images`` in [0, 1] the most usual-looking one that misleads; as it was, where none does.

    Projected gradient steps on the sign (Madry et al., 2018), at most ``radius`` from each pixel; the best of several
    random starts counts. ``weight`` is that of the detector's score beside the margin: 0 is unaware of it, None is
    selective, the margin until the image misleads, from there on the score (Bryniarski et al., 2021).
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
            # Of an attack that does not know the detector, the surest image counts, not the most usual one.
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
    """AutoAttack on the network alone, standard version (Croce and Hein, 2020), as its authors wrote it."""
    from pyautoattack import AutoAttack

    # Other memory layouts stop it.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    strongest = AutoAttack(model, eps=radius, norm="Linf", version="standard", seed=seed)
    return strongest.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))[0]
