"""Pages, README and documentation say what bench/results says."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
from PIL import Image

from bench.report import __main__ as command
from bench.report import blocks, detection, figures, pages, speed, text

ROOT = pathlib.Path(__file__).parents[2]
CASES = [
    {"case": case, "implementation": name, "median_s": median, "p10_s": median, "p90_s": median, "peak_bytes": 2048,
     "relative_to": "training step", "ratio": ratio, "correct": median is not None, "note": note}
    for case, name, median, ratio, note in (
        ("net B=8", "fastgrad", 0.5, 0.5, ""), ("net B=8", "training step", 1.0, 1.0, ""),
        ("net B=8", "vmap(grad)", 4.0, 4.0, ""),
        ("net B=8", "BackPACK BatchL2Grad", None, None, "TypeError: batch norm"),
        ("net B=8", "Opacus ghost norms", None, None, "the relative error must be at most 1e-3 to be timed; it was 1"),
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    head = {"machine": "here", "versions": {"torch": "2"}, "revision": "abc", "seed": 0, "cases": CASES}
    (tmp_path / "network.json").write_text(json.dumps(head))
    return tmp_path


def test_pages_and_blocks_say_what_the_results_say() -> None:
    found = command.stale()
    assert not found, f"run python -m bench.report; stale: {found}"


@pytest.mark.parametrize("document", command.DOCUMENTS, ids=lambda path: path.stem)
def test_no_value_ends_its_cell(document: pathlib.Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert blocks.BLOCK.search(text), "no block, so nothing to keep up to date: take it off the list"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not [row for row in rows if "|" in "".join(re.findall("<!-- value: (.*?) -->", row))]


@pytest.mark.parametrize("document", command.DOCUMENTS, ids=lambda path: path.stem)
def test_best_published_is_the_best(document: pathlib.Path) -> None:
    for words in re.findall("<!-- value: (.*?) -->", document.read_text(encoding="utf-8")):
        name, case, method, key, _ = (part.strip() for part in re.split("[|;]", words))
        network, _, case = case.rpartition(": ")
        results = blocks.load(name, pages.RESULTS)
        if key != results.get("merit") or name == "labelled" or method == "softmax" or not detection.published(method):
            continue
        found = detection.means(results["rows"], key, network, detection.PROTOCOLS[0])
        cells = {m: own.get(case.removeprefix("mean of "), {}) for m, own in found.items() if detection.published(m)}
        merits = {m: cell[key] for m, cell in cells.items() if key in cell}
        # Single cases stand beside each other, without a claim.
        assert not merits or merits[method] == max(merits.values()), words


def test_every_figure_is_shown_somewhere() -> None:
    pictures = {path.name for path in pages.RESULTS.glob("*.png")}
    texts = [path.read_text(encoding="utf-8") for path in (*pages.RESULTS.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    assert not [name for name in pictures if not any(f"{name})" in text for text in texts)]


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [(text.size, 1002 * 1024, "1002 KiB"), (text.size, 1024, "1 KiB"), (text.size, 1023, "1023 B"),
     (text.size, None, "-"), (text.duration, 1234.0, "1234 s"), (text.duration, 0.9996, "1000 ms"),
     (text.duration, 0.0123, "12.3 ms"), (text.digits, 2071.9, "2072"), (text.digits, 12345.0, "1.23e+04")],
)  # fmt: skip
def test_numbers_below_ten_thousand_have_no_power_of_ten(form: Any, value: float, shown: str) -> None:
    assert form(value) == shown


def test_shares_have_the_interval_of_wilson() -> None:
    from scipy.stats import binomtest

    for found in (0, 1, 41, 100):
        ends = binomtest(found, 100).proportion_ci(method="wilson")
        assert text.wilson(found, 100) == pytest.approx((ends.low, ends.high), abs=1e-12)
    assert text.share(0, 100) == "0.00 [0.00, 0.04]"


def test_no_message_ends_its_cell() -> None:
    assert text.table([{"note": "expected a | b\ngot c"}]) == "| note |\n| --- |\n| expected a \\| b got c |"


def test_a_figure_shows_values_intervals_and_a_line() -> None:
    value = figures.Value("0.900", 0.9, 0.8, 0.95)
    groups = {"head": [("fastgrad", [value, None]), ("softmax", [value, value])]}
    made = figures.dots(groups, "AUROC", line=(0.5, "chance"), titles=["one", "two"])
    first, second = made.axes
    assert [text.get_text() for text in first.texts] == ["0.900", "0.900", "head"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["fastgrad", "softmax"]
    assert [list(line.get_xdata()) for line in second.lines] == [[0.8, 0.95], [0.9], [0.5, 0.5]]
    assert made.get_supxlabel() == "AUROC\n(dashed: chance)"


def test_one_figure_never_gives_two_names_a_colour() -> None:
    for name in ("photographs", "attacks", "corruptions", "other-sets", "failure", "adaptive", "network", "last-layer"):
        made = pages.draw(json.loads((pages.RESULTS / f"{name}.json").read_text()))
        (first, *_) = made.axes
        names = {label.get_text() for label in first.get_yticklabels()} if made.get_supxlabel() else set()
        names |= {line.get_label() for line in first.lines if not line.get_label().startswith("_")}
        assert len({figures.colour(one) for one in names}) == len(names) > 1, name


def test_a_page_is_a_template_over_its_results(folder: pathlib.Path) -> None:
    text = pages.write("network", folder).read_text()
    assert "# Benchmark: network\n\nhere; torch 2; revision abc; seed 0." in text
    assert "| net B=8 | vmap(grad) | 4 s | 4 s to 4 s | 2 KiB | 4 | training step |  |" in text
    assert (
        "| net B=8 | BackPACK BatchL2Grad | refused | - | 2 KiB | - | training step | TypeError: batch norm |" in text
    )
    assert text.endswith("![network: time over fastgrad's, by case](network.png)\n")
    with Image.open(folder / "network.png") as image:
        assert image.width == figures.WIDTH
    assert command.stale(folder, []) == []
    (folder / "network.md").write_text(text.replace("4 s", "3 s"))
    assert command.stale(folder, []) == ["network.md"]


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("training step", "| net B=8 | 500 ms | 2 KiB | 0.50 | 1.00 | 8 | refused | wrong by 1 | 750 ms | 1.5 s |"),
        ("network alone", "| net B=8 | fastgrad | 16 | 500 ms | 500 ms to 500 ms | 0.50 | 2 KiB | 750 ms |"),
    ],
)
def test_latencies_of_a_gpu_stand_beside_times_of_graphs(base: str, line: str, folder: pathlib.Path) -> None:
    timed = [row | ({"latency_s": 1.5 * row["median_s"]} if row["correct"] else {}) for row in CASES]
    assert line in speed.tables([row | {"relative_to": base} for row in timed])
    pages.store(folder / "network.json", {"machine": "here", "versions": {}, "revision": "abc", "cases": timed})
    assert "| latency |" in pages.write("network", folder).read_text()


def test_a_changed_figure_is_found(folder: pathlib.Path) -> None:
    text = "a\n<!-- table: network -->\n<!-- end -->\n"
    text += "b <!-- value: network | net B=8 | fastgrad | ratio | .2f --><!-- end -->"
    filled = blocks.fill(text, folder)
    assert "| net B=8 | 500 ms | 2 KiB | 0.50 | 1.00 | 8 | refused | wrong by 1 |" in filled
    assert filled.endswith("-->0.50<!-- end -->")
    assert blocks.differing(filled, folder) == []
    assert blocks.fill(filled, folder) == filled
    assert blocks.differing(filled.replace("500 ms", "400 ms"), folder) == ["table: network"]
    assert blocks.differing(filled.replace("-->0.50<", "-->0.49<"), folder)
    assert blocks.value("network | net B=8 | fastgrad | peak_bytes | size", folder) == "2 KiB"
    assert blocks.value("network | net B=8 | fastgrad | median_s | duration", folder) == "500 ms"


@pytest.mark.parametrize("words", ["network", "network | net B=9 | fastgrad | ratio | .2f", "none | a | b | c | d"])
def test_an_unknown_value_is_refused(words: str, folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"value|one of"):
        blocks.value(words, folder)


def _with(name: str, **changed: Any) -> list[dict[str, Any]]:
    return [row | changed if row["implementation"] == name else row for row in CASES]


STANDINGS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "ahead": (CASES, "fastgrad is ahead of every peer in every case below."),
    "behind": (
        _with("vmap(grad)", median_s=0.25),
        "fastgrad is behind in: net B=8: vmap(grad) is 2.00 times faster.",
    ),
    "not timed": (_with("fastgrad", median_s=None), "fastgrad is behind in: net B=8: fastgrad is not timed."),
    "no peer": (CASES[:2], "No peer is measured here."),
    "textbook": (
        _with("vmap(grad)", implementation="closed form, textbook", median_s=0.25)[:3],
        "fastgrad is ahead of every peer that keeps its accuracy.\n\nThe textbook form "
        "`(||p||^2 - 2 p_k + 1)(||h||^2 + 1)`, eager or compiled, is faster in 1 comparisons, by up to 2 times.",
    ),
}


@pytest.mark.parametrize("case", STANDINGS)
def test_the_line_above_a_table_says_who_is_ahead(case: str) -> None:
    rows, expected = STANDINGS[case]
    assert speed.standing(rows).startswith(expected)


@pytest.fixture
def detection_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    rows = []
    for network, draw, method, protocol, figure in (
        ("a", 0, "energy", "clean data only", 0.6), ("a", 1, "energy", "clean data only", 0.8),
        ("a", 0, "KNN", "clean data only", 0.9), ("a", 1, "KNN", "clean data only", None),
        ("a", 0, "published scores, control", "clean data only", 0.99),
        ("a", 1, "published scores, control", "clean data only", 0.99),
        ("a", 0, "fastgrad, budget 1.2", "with generated challenges", 0.9),
        ("a", 1, "fastgrad, budget 1.2", "with generated challenges", 1.0), ("b", 0, "energy", "clean data only", 0.5),
    ):  # fmt: skip
        row = {"network": network, "draw": draw, "method": method, "protocol": protocol, "group": "attacks"}
        row["case"] = "mean of attacks"
        rows.append(row | ({"not run": "no weights"} if figure is None else {"auroc": figure, "interval": [0.4, 1.0]}))
    (tmp_path / "attacks.json").write_text(json.dumps({"merit": "auroc", "rows": rows}))
    return tmp_path


def test_value_is_the_mean_over_draws(detection_folder: pathlib.Path) -> None:
    words = "attacks | a: mean of attacks | energy | auroc | .2f"
    assert blocks.value(words, detection_folder) == "0.70"
    assert blocks.value(words.replace("a:", "b:"), detection_folder) == "0.50"
    with pytest.raises(KeyError):
        blocks.value(words.replace("energy", "KNN"), detection_folder)


def test_a_range_is_over_networks(detection_folder: pathlib.Path) -> None:
    words = "attacks | mean of attacks | energy | auroc | .2f"
    assert blocks.span(words, detection_folder) == "0.50 to 0.70"
    assert blocks.fill(f"<!-- range: {words} --><!-- end -->", detection_folder).endswith("-->0.50 to 0.70<!-- end -->")
    with pytest.raises(ValueError, match="must name a case and a method"):
        blocks.span(words.replace("energy", "ViM"), detection_folder)
    document = json.loads((detection_folder / "attacks.json").read_text())
    document["rows"].append(document["rows"][0] | {"case": "mean of far sets", "auroc": 0.9})
    (detection_folder / "several.json").write_text(json.dumps(document))
    several = words.replace("attacks |", "several |", 1)
    assert blocks.span(several, detection_folder) == "0.50 to 0.70"
    assert blocks.span(several.replace("of attacks", "of *"), detection_folder) == "0.50 to 0.90"


def test_strongest_published_detector(detection_folder: pathlib.Path) -> None:
    assert "| attacks |  | energy 0.700 ± 0.141 | 0.950 ± 0.071 |" in blocks.table("attacks a", detection_folder)
    rows = json.loads((detection_folder / "attacks.json").read_text())["rows"]
    found = detection.means(rows, "auroc", "a", "clean data only")
    assert found["KNN"]["attacks"] == {"not run": "no weights"}
    assert found["energy"]["attacks"] == {"auroc": 0.7, "spread": 0.1414}
    assert "| KNN |  | no weights |" in detection.block(rows, "auroc", "a", "clean data only", {})


def test_several_networks_stand_in_one_table_by_group(detection_folder: pathlib.Path) -> None:
    path = detection_folder / "attacks.json"
    networks = {"a": ["A", True], "b": ["B", False]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"networks": networks}))
    lines = blocks.table("attacks a, b | attacks", detection_folder).splitlines()
    assert lines[0].startswith("| group | network | kinds | strongest published |")
    assert lines[2].startswith("| attacks | A, tuned on |  | energy 0.700 ± 0.141 | 0.950 ± 0.071 |")
    assert lines[3].startswith("| attacks | B, validation |  | energy 0.500 [0.400, 1.000] |")
    with pytest.raises(ValueError, match=r"must name groups of a, b; they were \['corruptions'\]"):
        blocks.table("attacks a, b | attacks | corruptions", detection_folder)


def test_one_field_by_network_or_by_case(detection_folder: pathlib.Path, folder: pathlib.Path) -> None:
    path = detection_folder / "attacks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"networks": {"a": ["A", True], "b": ["B", False]}}))
    words = "attacks by network | mean of attacks | auroc | .2f | energy | fastgrad, budget 1.2"
    assert blocks.table(words, detection_folder).splitlines()[2:] == [
        "| A, tuned on | 0.70 | 0.95 |", "| B, validation | 0.50 |  |"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"they were \['softmax'\]"):
        blocks.table(words + " | softmax", detection_folder)
    found = blocks.table("network by case | | ratio | .1f | fastgrad | vmap(grad)", folder).splitlines()
    assert found == ["|  | fastgrad | vmap(grad) |", "| --- | --- | --- |", "| net B=8 | 0.5 | 4.0 |"]


def test_one_method_stands_across_networks(tmp_path: pathlib.Path) -> None:
    rows = [
        {"network": network, "method": "ours", "case": case, "inside": inside, "width": 9.6}
        for network, case, inside in (("a", "clean", 1.0), ("a", "far sets", 0.5), ("b", "clean", 0.25))
    ]
    document = {"networks": {"a": ["A"], "b": ["B"]}, "rows": [*rows, {"network": "a", "accuracy": 0.9}]}
    (tmp_path / "error-rate.json").write_text(json.dumps(document))
    words = "error-rate across | ours | {inside:.2f} ({width:.0f}) | b | a"
    assert blocks.table(words, tmp_path).splitlines() == [
        "|  | B | A |", "| --- | --- | --- |", "| clean | 0.25 (10) | 1.00 (10) |", "| far sets |  | 0.50 (10) |"
    ]  # fmt: skip


def test_means_are_over_the_cases_of_a_group(tmp_path: pathlib.Path) -> None:
    rows = [{"method": "KNN", "group": "attacks", "auroc": auroc} for auroc in (0.5, 0.75)]
    rows += [{"method": "KNN", "group": "sets", "auroc": 1.0}, {"method": "KNN", "group": "sets", "not run": "none"}]
    (tmp_path / "untouched.json").write_text(json.dumps({"rows": rows}))
    assert blocks.table("untouched means | auroc | .3f", tmp_path).splitlines()[::2] == [
        "|  | attacks | sets |", "| KNN | 0.625 | 1.000 |"
    ]  # fmt: skip


def test_a_part_of_a_table_leaves_the_other_rows(tmp_path: pathlib.Path) -> None:
    def row(network: str, method: str, auroc: float) -> dict[str, Any]:
        return {"network": network, "draw": 0, "method": method, "case": "FGSM", "auroc": auroc}

    old = {"machine": "A", "revision": "1", "quick": True, "seconds": 9}
    old["rows"] = [row("a", "KNN", 0.5), row("a", "ViM", 0.5), row("b", "KNN", 0.5)]
    new = {"machine": "B", "revision": "2", "quick": True, "seconds": 1, "rows": [row("a", "KNN", 0.75)]}
    found = pages.joined(old, new, ["KNN"])
    assert found["rows"] == [*new["rows"], *old["rows"][1:]]
    assert (found["machine"], found["revision"], found["seconds"]) == ("A; B", "1, KNN 2", 9)
    absent = [{"network": name, "draw": 0, "not run": "no weights"} for name in ("a", "c")]
    assert pages.joined(old, new | {"rows": absent}, ["a", "c"])["rows"] == [*old["rows"], absent[1]]
    with pytest.raises(ValueError, match="must have one size"):
        pages.joined(old, new | {"quick": False}, ["KNN"])


def test_later_runs_add_implementations() -> None:
    head = {"machine": "A", "versions": {"torch": "2"}, "revision": "1", "cases": CASES}
    later = [
        CASES[0] | {"median_s": 2.0}, CASES[2] | {"median_s": 1.0},
        CASES[1] | {"implementation": "dattri-llm", "median_s": 5.0, "covered": 0.9999, "ratio": 1.25},
        CASES[1] | {"implementation": "bergson", "median_s": 1.0, "covered": 1.0, "ratio": 0.25},
        CASES[3] | {"implementation": "absent", "note": "ModuleNotFoundError: No module named 'absent'"},
        CASES[2] | {"case": "a case that the file lacks", "implementation": "bergson"},
    ]  # fmt: skip
    new = {"machine": "B", "versions": {"bergson": "3"}, "revision": "2", "cases": later}
    found = pages.added(head, new)
    assert found["cases"][: len(CASES)] == CASES
    assert [row["beside_s"] for row in found["cases"][len(CASES) :]] == [2.0, 2.0, 2.0]
    assert (found["machine"], found["revision"]) == ("A; B", "1, dattri-llm, bergson, absent 2")
    assert found["versions"] == {"torch": "2", "bergson": "3"}
    shown = speed.tables(found["cases"])
    assert "| 2.5, for 99.9 % of the numbers | 0.5 | not installed |" in shown
    assert shown.startswith("fastgrad is behind in: net B=8: bergson is 2.00 times faster.\n")
    part = [row | ({"median_s": 1.0} if row["implementation"] == "dattri-llm" else {}) for row in found["cases"]]
    assert speed.standing([row for row in part if row["implementation"] != "bergson"]) == (
        "fastgrad is ahead of every peer in every case below that does the whole of it. "
        "net B=8: dattri-llm is 2.00 times faster for 99.9 % of the numbers."
    )
    assert [text.get_text() for text in figures.draw(found).axes[0].texts][:3] == ["1", "2", "0.5"]
    again = pages.added(found, new | {"cases": [later[0], later[2] | {"median_s": 7.0}]})
    assert [row["median_s"] for row in again["cases"][len(CASES) :]] == [1.0, None, 7.0]
    assert pages.added(head, new | {"cases": later[:2]}) == head


def test_rows_stay_by_their_keys() -> None:
    rows = [{"model": model, "tool": tool, "steps": 1} for model in "ab" for tool in ("x", "y")]
    old = {"machine": "A", "versions": {}, "revision": "1", "rows": rows}
    new = old | {"revision": "2", "rows": [rows[3] | {"steps": 2}]}
    found = pages.joined(old, new, ["1 rows"], ("model", "tool"))
    assert found == old | {"revision": "1, 1 rows 2", "rows": [*rows[:3], *new["rows"]]}
    everything = new | {"rows": rows}
    assert pages.joined(old, everything, ["4 rows"], ("model", "tool")) == everything


def test_of_labelled_challenges_the_figure_has_every_detector() -> None:
    aurocs = {"LID, labelled": 0.7, "gradient norms, labelled": 0.8, "fastgrad, labelled": 0.9}
    head = {"network": "a", "draw": 0, "group": "attacks", "case": "mean of attacks"}
    for protocol, shown in (("with labelled challenges", 3), ("clean data only", 2)):
        rows = [head | {"method": name, "protocol": protocol, "auroc": auroc} for name, auroc in aurocs.items()]
        made = detection.by_group({"merit": "auroc", "rows": rows, "networks": {"a": ["A", False]}})
        assert len(made.axes[0].get_yticklabels()) == shown


def test_second_answers_show_gains_of_every_case() -> None:
    gains = {"H on h, gated": 0.1, "H on h": 0.4, "batch norm adapted": -0.2}
    rows = [
        {"network": "a", "method": name, "case": "clean", "gain": p, "interval": [p - 0.1, p + 0.1]}
        for name, p in gains.items()
    ]
    rows.append({"network": "b", "not run": "no weights"})
    made = detection.second_answers({"rows": rows, "networks": {"a": ["A", True], "b": ["B", True]}})
    assert [text.get_text() for text in made.axes[0].texts] == ["+10.0", "-20.0", "A"]
    assert not made.axes[1].texts


def test_attacks_that_mislead_nothing_have_no_row() -> None:
    row = {"network": "a", "case": "2/255", "method": "default", "found, selective": 0, "misled, selective": 0}
    both = row | {"found, AutoAttack": 0, "misled, AutoAttack": 4}
    made = detection.found_attacks({"rows": [both], "networks": {"a": "A"}})
    assert [text.get_text() for text in made.axes[0].texts] == ["0 of 4", "A, 2/255, default"]
    assert detection.found_attacks({"rows": [row], "networks": {"a": "A"}}) is None
