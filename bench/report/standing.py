"""Who is faster: fastgrad's implementations against the peers', and which comparisons count."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.document import Row
from bench.report.units import sizes

#: Implementations that are yardsticks or neighbours: they do less than the task, so nothing is claimed against them.
YARDSTICKS = {
    "torch.softmax", "linear alone", "training step", "training step, compiled", "training step, memory kept",
    "forward", "forward and data gradients", "network alone",
    "Liger fused linear loss", "Cut Cross-Entropy", "stored rows", "torch.copy_", "torch.mm", "torch.add_",
}  # fmt: skip
#: Of fastgrad's implementations that have an addition to their name, those that do a case's own task.
SAME = ("fastgrad, whole network", "fastgrad, compiled")
#: Medians closer than this are not told apart.
NOISE = 1.02
#: Peers that are right on the timed inputs but have no correct digit once a sample is confident (margin 20).
TEXTBOOK = {
    "closed form, textbook", "closed form, torch.compile", "linear, softmax, closed form", "the same, torch.compile",
}  # fmt: skip


def ours(implementation: str) -> bool:
    """Whether an implementation is fastgrad's."""
    return implementation.startswith("fastgrad")


def grouped(cases: Sequence[Row], floors: bool = False) -> dict[str, list[Row]]:
    """The rows of each case, in order; without the floors unless asked for."""
    found: dict[str, list[Row]] = {}
    for row in cases:
        if floors or not row["case"].startswith("floor:"):
            found.setdefault(row["case"], []).append(row)
    return found


def by_size(case: str) -> tuple[int, int]:
    """Key that sorts cases of the last layer by classes, then samples; others stay as they are."""
    found = sizes(case)
    return (found["N"], found["B"]) if "N" in found else (0, 0)


def best(group: Sequence[Row]) -> Row | None:
    """The fastest of fastgrad's implementations of a case's task, of those at the present revision.

    End to end they do different things; there the one that does what the peer does is the whole network's.
    """
    timed = [
        r for r in group
        if ours(r["implementation"]) and " @ " not in r["implementation"] and r["median_s"]
        and ("," not in r["implementation"] or r["implementation"] in SAME)
    ]  # fmt: skip
    return min(timed, key=lambda r: r["median_s"]) if timed else None


def behind(cases: Sequence[Row], textbook: bool = False) -> list[str]:
    """Where a peer is faster than fastgrad, one line each; the textbook forms only and alone if asked for."""
    lines = []
    for case, group in grouped(cases).items():
        mine = best(group)
        for row in group:
            name = row["implementation"]
            peer = name in TEXTBOOK if textbook else not ours(name) and name not in YARDSTICKS | TEXTBOOK
            if mine and peer and row["median_s"] and NOISE * row["median_s"] < mine["median_s"]:
                lines.append(f"{case}: {name} is {mine['median_s'] / row['median_s']:.2f} times faster")
    return lines


def standing(cases: Sequence[Row]) -> str:
    """The lines above every table: ahead of every peer, or where not."""
    names = {row["implementation"] for row in cases if not row["case"].startswith("floor:")}
    if all(ours(name) or name in YARDSTICKS for name in names):
        return "No peer is measured here."
    late, inaccurate = behind(cases), behind(cases, textbook=True)
    text = (
        "fastgrad is behind in: " + "; ".join(late) + "."
        if late
        else (
            "fastgrad is ahead of every peer in every case below."
            if not inaccurate
            else "fastgrad is ahead of every peer that keeps its accuracy."
        )
    )
    if inaccurate:
        factors = [float(line.rsplit(" is ", 1)[1].split()[0]) for line in inaccurate]
        text += (
            f"\n\nFaster than fastgrad in {len(factors)} comparisons, by up to {max(factors):.2g} times, is the form "
            "`(||p||^2 - 2 p_k + 1)(||h||^2 + 1)` as one writes it down first, eager or compiled; it has no correct "
            "digit for samples that the network is sure of, and is not timed where the inputs hold such a sample."
        )
    return text
