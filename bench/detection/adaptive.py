"""Attacks that know the detector: they seek an image that misleads the network *and* that the detector lets pass.

How they see it, and how they seek, is in `bench.detection.white_box`. The attacks: on the network alone (*unaware*;
AutoAttack); on the margin less lambda times the detector's score; selective. An image is *protected* if every one of
its attacks fails or is found (Granese et al., MEAD, 2022), at a threshold that flags a twentieth of clean photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.detection.data import sets
from bench.detection.methods_ours import fitted
from bench.detection.registry import NETWORKS, PHOTOGRAPHS, SMALL, Options
from bench.detection.subject import Fit, Subject
from bench.detection.white_box import STEPS, WhiteBox, attack, auto_attack, unaware_of, white_box
from bench.report.pages import printed
from fastgrad.detector.presets import DEFAULT_BLOCKS, EXTENDED_BLOCKS

FALSE_ALARMS = 0.05
RADII = (2 / 255, 8 / 255)
#: The blocks of the attacked detectors.
FORMS: Mapping[str, Sequence[str]] = {"default": DEFAULT_BLOCKS, "second pass": EXTENDED_BLOCKS}
#: Weights of the detector's score beside the margin; None is selective.
LAMBDAS: Mapping[str, float | None] = {"lambda 0.1": 0.1, "lambda 1": 1.0, "selective": None}
DEFAULT_NETWORKS = ("lite0", "resnet20")
#: By kind of data: attacked images, random starts of each objective, images at a time.
#: A photograph takes a hundred times as long as a small image.
EFFORTS = {PHOTOGRAPHS: (100, 1, 8), SMALL: (100, 5, 25)}
#: What happens to images between the attack and the network.
WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {"": lambda images: images, " after JPEG": sets.compress}


def measure(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield a row for each radius and detector: how many images mislead, how many of those are found."""
    fit, model, (count, starts, batch) = Fit(subject), subject.model, EFFORTS[subject.kind]
    forms = list(FORMS)
    if subject.options.quick and subject.few:
        count, forms = 8, forms[:1]
    x, labels = (value[subject.right["test"][:count]] for value in subject.parts["test"])
    boxes = {form: white_box(fitted(fit, FORMS[form]), x[:3], FALSE_ALARMS) for form in forms}

    def every(make: Callable[..., Tensor], seen: Any, *settings: Any) -> Tensor:
        parts = zip(x.split(batch), labels.split(batch), strict=True)
        return torch.cat([make(seen, *part, *settings, seed=seed) for seed, part in enumerate(parts)])

    def answers(box: WhiteBox, images: Tensor) -> tuple[Tensor, Tensor]:
        found = [box.model(part) for part in images.split(batch)]
        return torch.cat([one.logits for one in found]), torch.cat([one.uncertainty for one in found])

    for radius in RADII:
        # What does not depend on the detector is made once.
        shared = {"unaware": every(attack, unaware_of(model), radius, 0.0, starts)}
        try:
            shared["AutoAttack"] = every(auto_attack, model, radius)
        except ModuleNotFoundError as absent:
            print(f"AutoAttack is not run: {absent}", file=sys.stderr)
        for form, box in boxes.items():
            made = shared | {name: every(attack, box, radius, weight, starts) for name, weight in LAMBDAS.items()}
            row: dict[str, Any] = {"network": subject.network, "case": f"{round(255 * radius)}/255", "method": form}
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
    return rows, {"steps": STEPS, "networks": {name: NETWORKS[name].title for name in networks}}
