"""Fill the marked blocks of README.md from ``bench/results``, so that no figure there is typed by hand.

    python -m bench.readme            # rewrite README.md
    python -m bench.readme --check    # exit status 1 and a list if a block differs
    python -m bench.readme --names    # the tables there are

A block is a table or a single number:

    <!-- table: network -->
    ...
    <!-- end -->
    ResNet-18 takes <!-- value: network | ResNet-18 32x32 B=64 bce ones | fastgrad | ratio -->0.81<!-- end --> steps.

Tables, each made from the file of the same name in ``bench/results``:

- ``last-layer``, ``network``, ``rows``, ``end-to-end``, ``quick``: what ``fastgrad bench`` wrote. A first line says
  whether fastgrad is ahead of every peer, or where not; then one table a task, a row a case: fastgrad's time, peak
  memory and ratio to the yardstick, and by how much it is faster than each of the others. Words after the name keep
  the cases that contain them: ``<!-- table: last-layer contrasts -->``. ``<!-- table: environment network -->`` is the
  line of machine, versions, revision and floors of a file.
- ``compile``: the machine code of each kernel, the worst of its cases (``python -m bench.compile_report --out``).
- ``predicted``: the static performance model (``python -m bench.roofline --out``).
- ``detection``: AUROC by method from ``adversarial``, ``ood`` and ``corruption``, a mean for each group of cases.
- ``labelled``: AUROC of the methods trained on labelled attacks, a mean over the attacks for each network.
- any other file with ``rows``, those of ``bench/paper`` included: detection rows as cases against methods (AUROC),
  everything else as it is. Words after the name keep the rows in which a value equals them.

A value is ``FILE | CASE | IMPLEMENTATION | FIELD`` with an optional fifth part, a Python format (default ``.3g``):
FIELD is a key of the case (times in seconds), or ``faster``, the factor by which fastgrad's fastest form beats it,
or ``per second``, B of the case over the median.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report, results_file

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- (table|value): ([^>]+?) -->(.*?)<!-- end -->", re.DOTALL)
HEADS_OF_GROUPS = {
    "adversarial": "attacks",
    "ood": "CIFAR-10, other sets",
    "corruption": "corruptions",
}
MEASURED = ("last-layer", "network", "rows", "end-to-end", "quick")


def load(name: str, folder: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: There is none of that name.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ValueError(f"a README block must name one of {known}; it was {name!r}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(words: str, folder: Path = results_file.RESULTS) -> str:
    """The Markdown of a table block; ``words`` is what stands after ``table:``."""
    name, _, rest = words.strip().partition(" ")
    if name == "environment":
        return report.environment(load(rest, folder))
    if name == "detection":
        return summary(folder)
    if name == "labelled":
        return labelled(folder)
    document = load(name, folder)
    if "cases" in document and "seed" in document:
        return measured(document["cases"], rest)
    if name == "compile":
        return compiled(document["rows"])
    if name == "predicted":
        from bench.roofline.__main__ import HEADS, shown
        from bench.roofline.predict import Prediction

        kept = [r for r in document["rows"] if rest in ("", r["device"])]
        return results_file.table([shown(Prediction(**r)) for r in kept], HEADS)
    rows = [r for r in document["rows"] if not rest or rest in map(str, r.values())]
    if rows and {"network", "case", "method", "auroc"} <= set(rows[0]):
        return detection(rows)
    if not rows:
        raise ValueError(f"{name} must have rows with {rest!r}; it had none")
    return results_file.table(rows, {key: key for key in rows[0]})


def summary(folder: Path) -> str:
    """Mean AUROC of every method that saw no labels over attacks, other sets and corruptions.

    A case is an attack, a set or a corruption (mean over severities), a mean over networks; the last columns
    are the mean over all cases and the lowest.
    """
    groups: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, head in HEADS_OF_GROUPS.items():
        for row in load(name, folder)["rows"]:
            case = row["case"].partition("/")[0]
            if not any(word in case for word in ("after JPEG", "grey")):
                group = "digits, other sets" if row["network"].startswith("mnist") else head
                cases = groups.setdefault(row["method"], {}).setdefault(group, {})
                cases.setdefault(case, []).append(row["auroc"])
    heads = list(dict.fromkeys(group for found in groups.values() for group in found))
    lines = []
    for method, found in groups.items():
        # A method that lacks a group, or needs labels, would be compared on other terms.
        if set(found) == set(heads):
            means = {g: {case: sum(v) / len(v) for case, v in cases.items()} for g, cases in found.items()}
            every = {case: value for cases in means.values() for case, value in cases.items()}
            lowest = min(every, key=lambda case, every=every: every[case])
            line = {"method": method}
            line |= {g: f"{sum(means[g].values()) / len(means[g]):.3f}" for g in heads}
            line["all cases"] = f"{sum(every.values()) / len(every):.3f}"
            line["lowest"] = f"{every[lowest]:.3f} ({lowest})"
            lines.append(line)
    lines.sort(key=lambda line: line["all cases"], reverse=True)
    return results_file.table(lines, {key: key for key in ("method", *heads, "all cases", "lowest")})


def labelled(folder: Path) -> str:
    """Mean AUROC over the attacks, for each network, of every method that is trained on the attack itself."""
    unlabelled = {row["method"] for row in load("ood", folder)["rows"]}
    found: dict[str, dict[str, list[float]]] = {}
    for row in load("adversarial", folder)["rows"]:
        # Mahalanobis P needs images and so has no row among the other sets; it needs no labels either.
        if row["method"] not in unlabelled | {"Mahalanobis P"} and "after JPEG" not in row["case"]:
            found.setdefault(row["method"], {}).setdefault(row["network"], []).append(row["auroc"])
    lines = [
        {"trained on labelled attacks": method} | {n: f"{sum(v) / len(v):.3f}" for n, v in networks.items()}
        for method, networks in found.items()
    ]
    return results_file.table(lines, {key: key for key in lines[0]})


def measured(cases: Sequence[report.Row], text: str = "") -> str:
    """One table for each task (cases that share a yardstick and whose first word is the same, or are networks)."""
    cases = [r for r in cases if text in r["case"] and not r["case"].startswith("floor:")]
    if not cases:
        raise ValueError(f"a README block must keep at least one case; {text!r} kept none")
    tasks: dict[str, dict[str, list[report.Row]]] = {}
    for case, group in report.grouped(cases).items():
        tasks.setdefault(_task(case, group), {})[case] = group
    tables = [_plain(g) if task.endswith("|network alone") else _pivot(g) for task, g in tasks.items()]
    return "\n\n".join([report.standing(cases), *tables])


def _task(case: str, group: Sequence[report.Row]) -> str:
    first = case.split(" B=")[0] if group[0]["relative_to"] in ("torch.softmax", "linear alone") else ""
    return f"{first}|{group[0]['relative_to']}"


def _pivot(groups: dict[str, list[report.Row]]) -> str:
    yardstick = next(iter(groups.values()))[0]["relative_to"]
    others = list(
        dict.fromkeys(
            r["implementation"] for g in groups.values() for r in g if not report.ours(r["implementation"])
        )
    )
    heads = ["case", "fastgrad", "peak memory", f"time over {yardstick}", f"memory over {yardstick}"]
    heads += [f"{other}, times fastgrad" for other in others if other != yardstick]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for case, group in sorted(groups.items(), key=lambda item: _order(item[0])):
        mine = report.best(group)
        by_name = {r["implementation"]: r for r in group}
        if mine is None:
            lines.append(f"| {case} | not timed |" + " |" * (len(heads) - 2))
            continue
        base = by_name.get(yardstick, {}).get("peak_bytes")
        memory = f"{mine['peak_bytes'] / base:.2f}" if base and mine["peak_bytes"] else "-"
        ratio = f"{mine['ratio']:.2f}" if mine["ratio"] else "-"
        cells = [case, report.duration(mine["median_s"]), report.size(mine["peak_bytes"]), ratio, memory]
        for other in others:
            if other != yardstick:
                row = by_name.get(other)
                cells.append(_factor(row, mine))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(case: str) -> tuple[int, int]:
    """Cases of the last layer by classes, then samples; others stay as they are."""
    sizes = {letter: int(number) for letter, number in re.findall(r"\b([BN])=(\d+)", case)}
    return (sizes["N"], sizes["B"]) if "N" in sizes else (0, 0)


def _factor(row: report.Row | None, mine: report.Row) -> str:
    if row is None:
        return "-"
    if not row["median_s"]:
        return "refused or wrong"
    factor = row["median_s"] / mine["median_s"]
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def _plain(groups: dict[str, list[report.Row]]) -> str:
    """Samples per second, latency and ratio, where the implementations do different things."""
    lines = [
        "| case | implementation | per second | median | p10 to p90 | ratio | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, group in groups.items():
        for row in group:
            if row["median_s"]:
                cells = (
                    case, row["implementation"], f"{_batch(case) / row['median_s']:.3g}",
                    report.duration(row["median_s"]),
                    f"{report.duration(row['p10_s'])} to {report.duration(row['p90_s'])}",
                    f"{row['ratio']:.2f}" if row["ratio"] else "-", report.size(row["peak_bytes"]),
                )  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _batch(case: str) -> int:
    found = re.search(r"\bB=(\d+)", case)
    if found is None:
        raise ValueError(f"a case must have its batch in its name to count per second; it was {case!r}")
    return int(found[1])


def compiled(rows: Sequence[dict[str, Any]]) -> str:
    """Kernels by architecture: the largest registers, shared memory and spills, the fewest wide accesses."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    summary = []
    for (kernel, arch), group in groups.items():
        wide = [r for r in group if r["expects_wide"]]
        products = [r for r in group if r["expects_matrix"]]
        summary.append(
            {
                "kernel": kernel,
                "arch": arch,
                "cases": len(group),
                "registers": max(r["registers"] for r in group),
                "spills": max(r["spills"] for r in group),
                "shared": max(r["shared"] for r in group),
                "loads": min((r["wide_loads"] for r in wide), default=None),
                "stores": min((r["wide_stores"] for r in wide), default=None),
                "matrix": min((r["matrix"] for r in products), default=None),
            }
        )
    heads = {
        "kernel": "kernel", "arch": "architecture", "cases": "cases", "registers": "most registers",
        "spills": "spills", "shared": "most shared bytes", "loads": "fewest 16-byte loads",
        "stores": "fewest 16-byte stores", "matrix": "fewest matrix instructions",
    }  # fmt: skip
    return results_file.table(summary, heads)


def detection(rows: Sequence[dict[str, Any]]) -> str:
    """AUROC, a row for each network and case, a column for each method."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        shown = f"{row['auroc']:.3f}"
        if row.get("spread"):
            shown += f" ± {row['spread']:.3f}"
        groups.setdefault((row["network"], row["case"]), {})[row["method"]] = shown
    table_rows = [{"network": n, "case": c, **cells} for (n, c), cells in groups.items()]
    return results_file.table(table_rows, {key: key for key in ("network", "case", *methods)})


def value(words: str, folder: Path = results_file.RESULTS) -> str:
    """The text of a value block; ``words`` is what stands after ``value:``."""
    parts = [part.strip() for part in words.split("|")]
    if len(parts) not in (4, 5):
        raise ValueError(f"a value must be FILE | CASE | IMPLEMENTATION | FIELD; it was {words!r}")
    name, case, implementation, key = parts[:4]
    group = [r for r in load(name, folder)["cases"] if r["case"] == case]
    rows = [r for r in group if r["implementation"] == implementation]
    if not rows:
        raise ValueError(f"a value must name a case and an implementation of {name}; it was {words!r}")
    row, mine = rows[0], report.best(group)
    if key == "faster":
        if mine is None or not row["median_s"]:
            raise ValueError(f"a factor needs two timed implementations; it was {words!r}")
        number = row["median_s"] / mine["median_s"]
    elif key == "per second":
        number = _batch(case) / row["median_s"]
    else:
        number = row[key]
    return format(number, parts[4] if len(parts) == 5 else ".3g")


def fill(text: str, folder: Path = results_file.RESULTS) -> str:
    """A document with its blocks made anew."""

    def one(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].strip()
        if kind == "table":
            return f"<!-- table: {words} -->\n\n{table(words, folder)}\n\n<!-- end -->"
        return f"<!-- value: {words} -->{value(words, folder)}<!-- end -->"

    return BLOCK.sub(one, text)


def differing(text: str, folder: Path = results_file.RESULTS) -> list[str]:
    """The names of the blocks whose content is not what the results say."""
    fresh = fill(text, folder)
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True)
    return [f"{old[1]}: {old[2]}" for old, new in pairs if old[3].strip() != new[3].strip()]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.readme", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a block is out of date")
    parser.add_argument("--names", action="store_true", help="list the tables there are")
    parser.add_argument("--file", type=Path, default=README, help="default README.md")
    options = parser.parse_args(arguments)
    if options.names:
        print("\n".join(sorted(path.stem for path in results_file.RESULTS.glob("*.json"))))
        return 0
    text = options.file.read_text()
    try:
        stale = differing(text)
        if not options.check:
            options.file.write_text(fill(text))
    except ValueError as error:
        print(f"bench.readme: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"{'out of date' if options.check else 'renewed'}: {name}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
