"""Tables of the speed cases: one for each task with a row per case, and who is faster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from bench.report.text import Row, digits, duration, size, sizes, table

#: Implementations that do less than the task: no claim is made about them.
YARDSTICKS = {
    "torch.softmax", "linear alone", "training step", "forward", "forward and data gradients", "network alone",
    "stored rows", "products with one sum, jvp", "sums of squares, fastgrad", "loss alone, Liger",
    "loss alone, Cut Cross-Entropy",
}  # fmt: skip
#: Peers that are right on the timed inputs but have no correct digit once a sample is confident (margin 20).
TEXTBOOK = {
    "closed form, textbook", "closed form, torch.compile", "linear, softmax, closed form", "the same, torch.compile",
}  # fmt: skip
#: Implementations of fastgrad's that do another task than the peers of their case.
OTHER_TASK = {"fastgrad, last layer", "fastgrad, three signals"}
#: Medians closer than this are not told apart.
NOISE = 1.02


def ours(implementation: str) -> bool:
    return implementation.startswith("fastgrad")


def whole(row: Row) -> bool:
    """Return whether an implementation does the task for all parameters."""
    return float(row.get("covered", 1)) == 1


def beside(row: Row, mine: Row) -> float:
    """Return fastgrad's time that a row goes with: of the run that added the row, else that of the table."""
    return float(row.get("beside_s") or mine["median_s"])


def grouped(cases: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each case, those of the last layer by classes and samples."""
    found: dict[str, list[Row]] = {}
    for row in cases:
        found.setdefault(row["case"], []).append(row)

    def by_size(case: str) -> tuple[int, int]:
        of = sizes(case)
        return (of["N"], of["B"]) if "N" in of else (0, 0)

    return dict(sorted(found.items(), key=lambda pair: by_size(pair[0])))


def best(group: Sequence[Row]) -> Row | None:
    """Return the fastest of fastgrad's implementations of a case's own task."""
    mine = [r for r in group if ours(r["implementation"]) and r["implementation"] not in OTHER_TASK]
    return min((r for r in mine if r["median_s"]), key=lambda r: float(r["median_s"]), default=None)


def standing(cases: Sequence[Row]) -> str:
    """Return the lines above a table: whether fastgrad is ahead of every peer, else in which cases it is not."""
    peers = {row["implementation"] for row in cases if not ours(row["implementation"])} - YARDSTICKS
    if not peers:
        return "No peer is measured here."
    textbook, untimed, parts, behind = [], [], [], defaultdict(list)
    for case, group in grouped(cases).items():
        mine = best(group)
        if mine is None:
            untimed.append(f"{case}: fastgrad is not timed")
            continue
        for row in group:
            name, median = row["implementation"], row["median_s"]
            if name in peers and median and NOISE * median < beside(row, mine):
                factor = beside(row, mine) / median
                if not whole(row):
                    parts.append(f"{_ahead(name, [(case, factor)])} for {_percent(row['covered'])} of the numbers")
                elif name in TEXTBOOK:
                    textbook.append(factor)
                else:
                    behind[name].append((case, factor))
    if untimed or behind:
        text = f"fastgrad is behind in: {'; '.join(untimed + [_ahead(*item) for item in behind.items()])}."
    else:
        every = "every peer that keeps its accuracy" if textbook else "every peer in every case below"
        text = f"fastgrad is ahead of {every}{' that does the whole of it' if parts else ''}."
    if parts:
        text += f" {'; '.join(parts)}."
    if textbook:
        text += (
            f"\n\nThe textbook form `(||p||^2 - 2 p_k + 1)(||h||^2 + 1)`, eager or compiled, is faster in "
            f"{len(textbook)} comparisons, by up to {max(textbook):.2g} times. It has no correct digit for "
            "samples that the network is sure of, and is *wrong* where its error on such a sample is too large."
        )
    return text


def _ahead(name: str, cases: Sequence[tuple[str, float]]) -> str:
    """Say of a faster peer in which case, or in how many, and by how much."""
    if len(cases) == 1:
        return f"{cases[0][0]}: {name} is {cases[0][1]:.2f} times faster"
    low, high = min(factor for _, factor in cases), max(factor for _, factor in cases)
    return f"{len(cases)} cases: {name} is {low:.2f} to {high:.2f} times faster"


def tables(cases: Sequence[Row], words: str = "") -> str:
    """Return who is ahead and one table for each task: cases whose first word and yardstick are the same."""
    cases = [r for r in cases if words in r["case"]]
    if not cases:
        raise ValueError(f"a table must keep at least one case; {words!r} kept none")
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in cases:
        base = row["relative_to"]
        first = row["case"].split(" B=")[0] if base in ("torch.softmax", "linear alone") else ""
        tasks.setdefault((first, base), []).append(row)
    shown = [_each(rows) if base == "network alone" else _beside(rows, base) for (_, base), rows in tasks.items()]
    return "\n\n".join([standing(cases), *shown])


def _beside(rows: Sequence[Row], yardstick: str) -> str:
    """Return fastgrad's time and memory over the yardstick's, and other implementations' time over fastgrad's."""
    names = dict.fromkeys(r["implementation"] for r in rows)
    others = [name for name in names if not ours(name) and name != yardstick]
    heads = ["case", "fastgrad", "peak memory", f"time over {yardstick}", f"memory over {yardstick}"]
    heads += [f"{other}, times fastgrad" for other in others]
    # On a GPU the other times are those of graphs.
    launched = any("latency_s" in row for row in rows)
    heads += ["latency of a call", f"latency of {yardstick}"] if launched else []
    shown = []
    for case, group in grouped(rows).items():
        mine, cells = best(group), [case, "not timed"]
        if mine is not None:
            by_name = {r["implementation"]: r for r in group}
            memory, base = mine["peak_bytes"], by_name.get(yardstick, {}).get("peak_bytes")
            cells = [case, duration(mine["median_s"]), size(memory), f"{mine['ratio']:.2f}" if mine["ratio"] else "-"]
            cells += [f"{memory / base:.2f}" if base and memory else "-"]
            cells += [_factor(by_name.get(other), mine) for other in others]
            latencies = [each.get("latency_s") for each in (mine, by_name.get(yardstick, {}))]
            cells += [duration(each) if each else "-" for each in latencies] if launched else []
        shown.append(dict(zip_longest(heads, cells)))
    return table(shown)


def _factor(row: Row | None, mine: Row) -> str:
    if row is None:
        return "-"
    if not row["median_s"]:
        absent = "not installed" if row["note"].startswith("ModuleNotFoundError") else "refused"
        return f"wrong by {row['note'].rpartition(' ')[2]}" if "relative error" in row["note"] else absent
    factor = row["median_s"] / beside(row, mine)
    text = f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"
    return text if whole(row) else f"{text}, for {_percent(row['covered'])} of the numbers"


def _percent(share: float) -> str:
    """Return a share below one, which is no 100 %."""
    return f"{min(99.9, 100 * share):.3g} %"


def _each(rows: Sequence[Row]) -> str:
    """Return samples per second, latency and ratio, for implementations that do different things."""
    return table(
        {
            "case": row["case"], "implementation": row["implementation"],
            "per second": digits(sizes(row["case"])["B"] / row["median_s"]), "median": duration(row["median_s"]),
            "p10 to p90": f"{duration(row['p10_s'])} to {duration(row['p90_s'])}",
            "ratio": f"{row['ratio']:.2f}" if row["ratio"] else "-", "peak memory": size(row["peak_bytes"]),
            **({"latency": duration(row["latency_s"])} if "latency_s" in row else {}),
        }
        for row in rows
        if row["median_s"]
    )  # fmt: skip
