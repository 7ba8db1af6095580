"""Tables of what ``fastgrad bench`` measured: one for each task, a row a case."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness import results_file
from bench.report.document import Row
from bench.report.standing import best, by_size, grouped, ours, standing
from bench.report.units import between, duration, size, sizes


def measured(cases: Sequence[Row], text: str = "") -> str:
    """One table for each task (cases that share a yardstick and whose first word is the same, or are networks)."""
    cases = [r for r in cases if text in r["case"] and not r["case"].startswith("floor:")]
    if not cases:
        raise ValueError(f"a README block must keep at least one case; {text!r} kept none")
    tasks: dict[str, dict[str, list[Row]]] = {}
    for case, group in grouped(cases).items():
        tasks.setdefault(_task(case, group), {})[case] = group
    tables = [_plain(g) if task.endswith("|network alone") else _pivot(g) for task, g in tasks.items()]
    return "\n\n".join([standing(cases), *tables])


def _task(case: str, group: Sequence[Row]) -> str:
    first = case.split(" B=")[0] if group[0]["relative_to"] in ("torch.softmax", "linear alone") else ""
    return f"{first}|{group[0]['relative_to']}"


def _pivot(groups: dict[str, list[Row]]) -> str:
    yardstick = next(iter(groups.values()))[0]["relative_to"]
    names = dict.fromkeys(r["implementation"] for group in groups.values() for r in group)
    others = [name for name in names if not ours(name) and name != yardstick]
    heads = ["case", "fastgrad", "peak memory", f"time over {yardstick}", f"memory over {yardstick}"]
    heads += [f"{other}, times fastgrad" for other in others]
    shown = []
    for case, group in sorted(groups.items(), key=lambda item: by_size(item[0])):
        mine = best(group)
        by_name = {r["implementation"]: r for r in group}
        if mine is None:
            shown.append(dict.fromkeys(heads) | {"case": case, "fastgrad": "not timed"})
            continue
        base = by_name.get(yardstick, {}).get("peak_bytes")
        memory = f"{mine['peak_bytes'] / base:.2f}" if base and mine["peak_bytes"] else "-"
        ratio = f"{mine['ratio']:.2f}" if mine["ratio"] else "-"
        cells = [case, duration(mine["median_s"]), size(mine["peak_bytes"]), ratio, memory]
        cells += [_factor(by_name.get(other), mine) for other in others]
        shown.append(dict(zip(heads, cells, strict=True)))
    return results_file.table(shown)


def _factor(row: Row | None, mine: Row) -> str:
    if row is None:
        return "-"
    if not row["median_s"]:
        return "refused or wrong"
    factor = row["median_s"] / mine["median_s"]
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def _plain(groups: dict[str, list[Row]]) -> str:
    """Samples per second, latency and ratio, where the implementations do different things."""
    shown = [
        {
            "case": case, "implementation": row["implementation"],
            "per second": f"{batch(case) / row['median_s']:.3g}", "median": duration(row["median_s"]),
            "p10 to p90": between(row), "ratio": f"{row['ratio']:.2f}" if row["ratio"] else "-",
            "peak memory": size(row["peak_bytes"]),
        }
        for case, group in groups.items()
        for row in group
        if row["median_s"]
    ]  # fmt: skip
    return results_file.table(shown)


def batch(case: str) -> int:
    """The batch in a case's name."""
    if "B" not in sizes(case):
        raise ValueError(f"a case must have its batch in its name to count per second; it was {case!r}")
    return sizes(case)["B"]
