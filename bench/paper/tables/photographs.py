"""The cases of the photographs: how often the network is right, and how many attacked images mislead it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench import results_file
from bench.paper.draws import AFTER, ATTACKS, COMPARED, STRANGERS, Draw
from bench.paper.figures import grouped_bars
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table


def draws(options: Options) -> list[Draw]:
    """As many draws as seeds were asked for, three at most."""
    return [Draw(options.data, options.cache, number) for number in range(min(options.seeds, COMPARED))]


def evaluate(draw: Draw) -> Rows:
    """One row for the test photographs, and one for each attack, as it is and after JPEG."""
    right = draw.right
    clean = {"case": "clean", "images": len(right), "misled": int((~right).sum())}
    attacks = [draw.case(name + after) for after in ("", AFTER) for name in ATTACKS]
    rows = [clean, *({"case": c.name, "images": c.tried, "misled": len(c.images)} for c in attacks)]
    return [
        {
            "network": draw.network,
            "draw": draw.name,
            **row,
            "rate": round(row["misled"] / row["images"], 4),
        }
        for row in rows
    ]


def write(options: Options, subjects: Sequence[Draw], found: Sequence[Rows]) -> Page:
    """Draws by cases."""
    rows = [row for own in found for row in own]
    rates = {(row["draw"], row["case"]): f"{row['misled']} of {row['images']}" for row in rows}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = [{"case": case} | {draw.name: rates[draw.name, case] for draw in subjects} for case in cases]
    text = (
        "Images that the network classifies wrongly. *clean*: of all test photographs of the draw; attacks: of "
        "photographs that it classifies rightly; *after JPEG*: attacked, then compressed (quality 75, 4:2:0 chroma). "
        "Only images that mislead the network count as a case of an attack."
    )
    mean = {case: float(np.mean([row["rate"] for row in rows if row["case"] == case])) for case in cases}
    bars = {
        "as attacked": [mean[name] for name in ATTACKS],
        "after JPEG": [mean[name + AFTER] for name in ATTACKS],
    }
    axes = grouped_bars(bars, list(ATTACKS), label="share that misleads the network")
    return Page(rows, [(text, results_file.table(lines))], axes)


TABLE = Table(
    "photographs",
    "Photographs and the attacks on them",
    ("photographs", *STRANGERS.values()),
    draws,
    evaluate,
    write,
)
