"""Attacks that know the detector: they seek an image that misleads the network *and* that the detector lets pass.

How they see it, and how they seek, is in `bench.paper.white_box`. The detectors: this package's default, what larger
budgets add to it, and a hardening try whose reading is random: one of several, each fitted on the activations of other
layers, answers for each image. The attacks: on the network alone (*unaware*; AutoAttack); on the margin less lambda
times the detector's score; selective. What was made against the default is also tried on the random one. An image is
*protected* if every one of its attacks either fails or is found (Granese et al., MEAD, 2022), at a threshold that flags
a twentieth of clean photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from bench import results_file
from bench.paper.attacked import DETECTORS, FALSE_ALARMS, RANDOM, SHARE, WAYS, Attacked
from bench.paper.draws import AFTER
from bench.paper.figures import grouped_bars
from bench.paper.resampled import bounds
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table
from bench.paper.white_box import STARTS, STEPS, WhiteBox, attack, auto_attack, unaware_of

RADII = (2 / 255, 8 / 255)
UNAWARE, AUTO, AIMED = "unaware", "AutoAttack", "selective at the default"
#: Weights of the detector's score beside the margin; None is selective. The first two are tried on the default alone.
LAMBDAS: Mapping[str, float | None] = {"lambda 0.1": 0.1, "lambda 1": 1.0, "selective": None}
#: Images at a time.
_BATCH = 8


def evaluate(subject: Attacked) -> Rows:
    """For every detector, radius and attack: which images mislead, and which of those are found."""
    x, labels = subject.draw.clean("test")
    picked = np.flatnonzero(subject.draw.right)[: subject.images]
    x, labels = x[picked], labels[picked]
    boxes = subject.boxes(x[:3])
    rows: Rows = []

    def every(make: Callable[..., Tensor], seen: Any, *settings: Any) -> Tensor:
        parts = zip(x.split(_BATCH), labels.split(_BATCH), strict=True)
        return torch.cat([make(seen, *part, *settings, seed) for seed, part in enumerate(parts)])

    alarms = {
        (form, way): float((_answers(box, change(x))[1] > box.threshold).float().mean())
        for form, box in boxes.items()
        for way, change in WAYS.items()
    }
    model = subject.draw.model
    for radius in RADII:
        # What does not depend on the detector is made once.
        shared = {
            UNAWARE: every(attack, unaware_of(model), radius, 0.0),
            AUTO: every(auto_attack, model, radius),
        }
        for form, box in boxes.items():
            made = shared | {
                name: every(attack, box, radius, weight)
                for name, weight in LAMBDAS.items()
                if weight is None or form == "default"
            }
            if form == "default":
                aimed = made["selective"]
            if form == RANDOM:
                made[AIMED] = aimed
            for name, attacked in made.items():
                for way, change in WAYS.items():
                    logits, uncertainty = _answers(box, change(attacked))
                    rows.append(
                        {
                            "draw": subject.name, "form": form, "radius": round(255 * radius), "attack": name,
                            "way": way, "alarms": alarms[form, way],
                            "misled": (logits.argmax(1) != labels).tolist(),
                            "found": (uncertainty > box.threshold).tolist(),
                        }
                    )  # fmt: skip
    return rows


def _answers(box: WhiteBox, images: Tensor) -> tuple[Tensor, Tensor]:
    logits, uncertainty = zip(*(box.uncertainty(part) for part in images.split(_BATCH)), strict=True)
    return torch.cat(logits), torch.cat(uncertainty)


def write(options: Options, subjects: Sequence[Attacked], found: Sequence[Rows]) -> Page:
    """Shares of the misleading images that are found, and of the images that are protected, for each way."""
    attacked = [row for own in found for row in own]
    rows: Rows = []
    lines: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    names = list(dict.fromkeys(row["attack"] for row in attacked))
    for radius, form in dict.fromkeys((row["radius"], row["form"]) for row in attacked):
        own = [row for row in attacked if (row["form"], row["radius"]) == (form, radius)]
        row: dict[str, Any] = {"case": f"{radius}/255", "method": form}
        for way in WAYS:
            line = {"radius": row["case"], "detector": form} | dict.fromkeys(names, "")
            pairs = {name: pair for name in names if (pair := _joined(own, name, way)) is not None}
            for name, (misled, seen) in pairs.items():
                row[f"misled, {name}{way}"], row[f"found, {name}{way}"] = (
                    int(misled.sum()),
                    int((misled & seen).sum()),
                )
                line[name] = f"{row[f'found, {name}{way}']} of {row[f'misled, {name}{way}']}"
            safe = np.all([~misled | seen for misled, seen in pairs.values()], 0)
            row["images"], row["protected" + way] = len(safe), float(safe.mean())
            row["alarms" + way] = float(np.mean([one["alarms"] for one in own if one["way"] == way]))
            low, high = binomtest(int(safe.sum()), len(safe)).proportion_ci(method="wilson")
            line["protected"] = f"{safe.mean():.2f} [{low:.2f}, {high:.2f}]"
            line["clean, flagged"] = f"{row['alarms' + way]:.2f}"
            lines[way].append(line)
        rows.append(row)
    count = rows[0]["images"]
    text = (
        f"EfficientNet-Lite0, {len(subjects)} draw, {count} photographs that the network classifies rightly; {STEPS} "
        f"steps and {STARTS} random start for each objective, AutoAttack in its standard version. Of the attacked "
        "images that mislead the network, how many the detector finds at a threshold that flags "
        f"{FALSE_ALARMS:.0%} of clean photographs. *unaware* and *AutoAttack* do not know the detector; empty: not "
        "tried. *protected*: share of the photographs of which every attack of the line fails or is found, with a 95 % "
        "interval (Wilson). *clean, flagged*: of the same photographs before the attack. *random layers*: for every "
        f"image one of {DETECTORS} detectors answers, each fitted on the activations of a random {SHARE:.0%} of the "
        "layers; *selective* differentiates their mean there, *selective at the default* is what was made against the "
        f"default. {verdict(attacked)}"
    )
    explained = {
        "": text,
        AFTER: "The same images after JPEG (quality 75).",
        " after resizing": "After resizing to nine tenths and back.",
        " after a crop": "After a crop of the middle nine tenths, enlarged to the old size.",
    }
    sections = [(explained[way], results_file.table(own)) for way, own in lines.items()]
    return Page(rows, sections, _figure(rows))


def verdict(attacked: Rows) -> str:
    """Whether reading random layers helps against the attack that knows everything, with an interval."""
    safe = {}
    for form in ("default", RANDOM):
        pairs = [
            _joined(
                [row for row in attacked if (row["form"], row["radius"]) == (form, radius)], "selective", ""
            )
            for radius in dict.fromkeys(row["radius"] for row in attacked)
        ]
        safe[form] = np.mean([~pair[0] | pair[1] for pair in pairs if pair is not None], 0)
    gain = safe[RANDOM] - safe["default"]
    low, high = bounds(np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1))
    said = "help" if low > 0 else "harm" if high < 0 else "make no difference"
    return (
        f"Against the selective attack on their mean random layers {said}: {safe[RANDOM].mean():.2f} of the "
        f"photographs are protected from it, {safe['default'].mean():.2f} with the default; difference "
        f"{gain.mean():+.2f} [{low:+.2f}, {high:+.2f}] over resampled photographs, both radii together."
    )


def _figure(rows: Rows) -> Any:
    every = (UNAWARE, AUTO, "selective")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by_key = {(row["method"], row["case"]): row for row in rows}
    bars = {
        form: [_share(by_key[form, case], name) for name in every for case in cases]
        for form in dict.fromkeys(row["method"] for row in rows)
    }
    return grouped_bars(
        bars, [f"{name}, {case}" for name in every for case in cases], label="share of attacks found"
    )


def _share(row: Mapping[str, Any], name: str) -> float:
    return float(row[f"found, {name}"]) / max(1, row[f"misled, {name}"])


def _joined(rows: Rows, name: str, way: str) -> tuple[Any, Any] | None:
    """Over draws, which images mislead and which are found; None where the attack was not tried."""
    own = [row for row in rows if (row["attack"], row["way"]) == (name, way)]
    if not own:
        return None
    misled, seen = (np.concatenate([np.array(row[key]) for row in own]) for key in ("misled", "found"))
    return misled, seen


TABLE = Table(
    "adaptive",
    "Attacks that know the detector",
    ("photographs",),
    lambda options: [Attacked(options)],
    evaluate,
    write,
)
