"""Geometric means of the conformance table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report.text import Row, table


def means(rows: Sequence[Row]) -> str:
    """Return a table: time and memory of peers that are exact over fastgrad's, for each and for the best of a model."""
    cells = {(row["model"], row["tool"]): row for row in rows if row["verdict"] == "exact"}
    peers = [tool for tool in dict.fromkeys(row["tool"] for row in rows) if tool != "fastgrad"]
    found = []
    for title, several in [*((peer, [peer]) for peer in peers), ("the best of these, model by model", peers)]:
        ratios = []
        for model in dict.fromkeys(row["model"] for row in rows):
            theirs = [cells[model, peer] for peer in several if (model, peer) in cells]
            if theirs and (own := cells.get((model, "fastgrad"))):
                ratios.append([min(row[key] for row in theirs) / own[key] for key in ("steps", "peak_bytes")])
        if ratios:
            times, sizes = (statistics.geometric_mean(each) for each in zip(*ratios, strict=True))
            found.append({"peer": title, "models": len(ratios), "time": times, "memory": sizes})
    return table(found)
