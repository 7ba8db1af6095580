"""Tables of the speed cases: one for each task, a row a case, and who is faster."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.text import Row, duration, size, sizes, table

#: Implementations that do less than the task: nothing is claimed against them.
YARDSTICKS = {
    "torch.softmax", "linear alone", "training step", "training step, compiled", "training step, memory kept",
    "forward", "forward and data gradients", "network alone", "Liger fused linear loss", "Cut Cross-Entropy",
    "stored rows",
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


def grouped(cases: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each case, those of the last layer by classes and samples."""
    found: dict[str, list[Row]] = {}
    for row in cases:
        found.setdefault(row["case"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: _by_size(item[0])))


def _by_size(case: str) -> tuple[int, int]:
    found = sizes(case)
    return (found["N"], found["B"]) if "N" in found else (0, 0)


def best(group: Sequence[Row]) -> Row | None:
    """Return the fastest of fastgrad's implementations of a case's own task."""
    timed = [
        r for r in group
        if ours(r["implementation"]) and r["median_s"]
        and ("," not in r["implementation"] or r["implementation"] in SAME)
    ]  # fmt: skip
    return min(timed, key=lambda r: float(r["median_s"])) if timed else None


def _faster(cases: Sequence[Row], textbook: bool) -> dict[str, float]:
    """Where a peer is faster than fastgrad, and by how much; the textbook forms only and alone if asked for."""
    found = {}
    for case, group in grouped(cases).items():
        mine = best(group)
        for row in group:
            name = row["implementation"]
            peer = name in TEXTBOOK if textbook else not ours(name) and name not in YARDSTICKS | TEXTBOOK
            if mine and peer and row["median_s"] and NOISE * row["median_s"] < mine["median_s"]:
                found[f"{case}: {name}"] = mine["median_s"] / row["median_s"]
    return found


def standing(cases: Sequence[Row]) -> str:
    """Return the lines above a table: ahead of every peer, or where not."""
    if all(ours(row["implementation"]) or row["implementation"] in YARDSTICKS for row in cases):
        return "No peer is measured here."
    behind, textbook = _faster(cases, False), _faster(cases, True)
    if behind:
        text = (
            f"fastgrad is behind in: {'; '.join(f'{n} is {f:.2f} times faster' for n, f in behind.items())}."
        )
    else:
        every = "every peer that keeps its accuracy" if textbook else "every peer in every case below"
        text = f"fastgrad is ahead of {every}."
    if textbook:
        text += (
            f"\n\nThe textbook form `(||p||^2 - 2 p_k + 1)(||h||^2 + 1)`, eager or compiled, is faster in "
            f"{len(textbook)} comparisons, by up to {max(textbook.values()):.2g} times. It has no correct digit for "
            "samples that the network is sure of, and is not timed where the inputs hold such a sample."
        )
    return text


def tables(cases: Sequence[Row], words: str = "") -> str:
    """Return who is ahead and one table for each task: cases whose first word and yardstick are the same.

    Raises:
        ValueError: No case contains the words.
    """
    cases = [r for r in cases if words in r["case"]]
    if not cases:
        raise ValueError(f"a table must keep at least one case; {words!r} kept none")
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in cases:
        first = row["case"].split(" B=")[0] if row["relative_to"] in ("torch.softmax", "linear alone") else ""
        tasks.setdefault((first, row["relative_to"]), []).append(row)
    shown = [
        _each(rows) if base == "network alone" else _beside(rows, base) for (_, base), rows in tasks.items()
    ]
    return "\n\n".join([standing(cases), *shown])


def _beside(rows: Sequence[Row], yardstick: str) -> str:
    names = dict.fromkeys(r["implementation"] for r in rows)
    others = [name for name in names if not ours(name) and name != yardstick]
    heads = ["case", "fastgrad", "peak memory", f"time over {yardstick}", f"memory over {yardstick}"]
    heads += [f"{other}, times fastgrad" for other in others]
    shown = []
    for case, group in grouped(rows).items():
        mine = best(group)
        by_name = {r["implementation"]: r for r in group}
        if mine is None:
            shown.append(dict.fromkeys(heads) | {"case": case, "fastgrad": "not timed"})
            continue
        base = by_name.get(yardstick, {}).get("peak_bytes")
        cells = [
            case, duration(mine["median_s"]), size(mine["peak_bytes"]),
            f"{mine['ratio']:.2f}" if mine["ratio"] else "-",
            f"{mine['peak_bytes'] / base:.2f}" if base and mine["peak_bytes"] else "-",
        ]  # fmt: skip
        cells += [_factor(by_name.get(other), mine) for other in others]
        shown.append(dict(zip(heads, cells, strict=True)))
    return table(shown)


def _factor(row: Row | None, mine: Row) -> str:
    if row is None:
        return "-"
    if not row["median_s"]:
        return "wrong" if "relative error" in row["note"] else "refused"
    factor = row["median_s"] / mine["median_s"]
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def _each(rows: Sequence[Row]) -> str:
    """Samples per second, latency and ratio, where the implementations do different things."""
    return table(
        {
            "case": row["case"], "implementation": row["implementation"],
            "per second": f"{batch(row['case']) / row['median_s']:.3g}", "median": duration(row["median_s"]),
            "p10 to p90": f"{duration(row['p10_s'])} to {duration(row['p90_s'])}",
            "ratio": f"{row['ratio']:.2f}" if row["ratio"] else "-", "peak memory": size(row["peak_bytes"]),
        }
        for row in rows
        if row["median_s"]
    )  # fmt: skip


def batch(case: str) -> int:
    """Return the batch in a case's name."""
    if "B" not in sizes(case):
        raise ValueError(f"a case must have its batch in its name to count per second; it was {case!r}")
    return sizes(case)["B"]
