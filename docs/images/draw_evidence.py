"""Draw what the default detector finds, as ``docs/images/evidence.png``: ``python -m docs.images.draw_evidence``.

For every network of ``bench/results`` and every group of inputs: fastgrad's default, and the best published detector
from the same clean inputs.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from bench.report.detection import PROTOCOLS, means, measured_networks, published
from bench.report.pages import RESULTS

#: Of each file the groups that are shown, and what they are called.
GROUPS = {
    "other-sets": {"far sets": "far sets", "near sets": "near sets"},
    "corruptions": {"corruptions unlike generated ones": "corruptions unlike\nthe generated ones"},
    "attacks": {"attacks": "attacks", "attacks after JPEG": "attacks after JPEG"},
}
OURS, BEST = "#cc5f00", "#4c566a"


def pairs(name: str, group: str) -> list[tuple[float, float]]:
    """Return for each network of a file the AUROC of fastgrad's default and of the best published detector."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    found = []
    for network in measured_networks(document["rows"]):
        rivals = {
            method: own[group]["auroc"]
            for method, own in means(document["rows"], "auroc", network, PROTOCOLS[0]).items()
            if published(method) and "auroc" in own.get(group, {})
        }
        ours = means(document["rows"], "auroc", network, PROTOCOLS[1])["fastgrad, default"].get(group, {})
        if rivals and "auroc" in ours:
            found.append((ours["auroc"], max(rivals.values())))
    return found


def draw() -> Figure:
    """Return a row for each group, with a pair of dots for each network."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    ticks, labels, y = [], [], 0.0
    for name, groups in GROUPS.items():
        for group, title in groups.items():
            found = pairs(name, group)
            for offset, (ours, best) in enumerate(found):
                axis.plot([ours, best], [y + offset] * 2, color="#d8dee9", linewidth=2, zorder=1)
                axis.plot(
                    best, y + offset, "o", color=BEST, label="best published detector" if y + offset == 0 else None
                )
                axis.plot(ours, y + offset, "D", color=OURS, label="fastgrad, default" if y + offset == 0 else None)
            ticks.append(y + (len(found) - 1) / 2)
            labels.append(f"{title}\n{len(found)} networks")
            y += len(found) + 1
    axis.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(ticks, labels, fontsize=11)
    axis.invert_yaxis()
    axis.set_xlim(0.45, 1.0)
    axis.set_xlabel("AUROC: unusual against clean inputs (0.5 is chance)", fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="upper left", fontsize=11, frameon=False)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("evidence.png"), dpi=110)
