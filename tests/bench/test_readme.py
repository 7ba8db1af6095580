"""The README's figures are those of bench/results."""

from __future__ import annotations

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]

from bench.report import readme, standing  # noqa: E402

CASES = [
    {"case": case, "implementation": name, "median_s": median, "p10_s": median, "p90_s": median, "peak_bytes": 2048,
     "relative_to": "training step", "ratio": ratio, "correct": median is not None}
    for case, name, median, ratio in (
        ("net B=8", "fastgrad", 0.5, 0.5), ("net B=8", "training step", 1.0, 1.0), ("net B=8", "vmap(grad)", 4.0, 4.0),
        ("net B=8", "BackPACK BatchL2Grad", None, None),
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    head = {"machine": "here", "versions": {"torch": "2"}, "revision": "abc", "seed": 0, "cases": CASES}
    (tmp_path / "network.json").write_text(json.dumps(head))
    rows = [
        {"network": "n", "case": "c", "method": m, "auroc": a, "spread": 0.01, "seeds": 3}
        for m, a in (("fastgrad", 0.9), ("energy", 0.5))
    ]
    (tmp_path / "ood.json").write_text(json.dumps({"machine": "here", "rows": rows}))
    return tmp_path


def test_readme_blocks_equal_the_results() -> None:
    stale = readme.differing((ROOT / "README.md").read_text())
    assert not stale, f"run python -m bench.report.readme; out of date: {stale}"


def test_a_changed_figure_is_found(folder: pathlib.Path) -> None:
    text = "a\n<!-- table: network -->\n<!-- end -->\n"
    text += "b <!-- value: network | net B=8 | fastgrad | ratio | .2f --><!-- end -->"
    filled = readme.fill(text, folder)
    assert "| net B=8 | 500 ms | 2 KiB | 0.50 | 1.00 | 8 | refused or wrong |" in filled
    assert filled.endswith("-->0.50<!-- end -->")
    assert readme.differing(filled, folder) == []
    assert readme.fill(filled, folder) == filled
    assert readme.differing(filled.replace("500 ms", "400 ms"), folder) == ["table: network"]
    assert readme.differing(filled.replace("-->0.50<", "-->0.49<"), folder)


def test_detection_rows_become_cases_against_methods(folder: pathlib.Path) -> None:
    assert "| n | c | 0.900 ± 0.010 | 0.500 ± 0.010 |" in readme.table("ood", folder)


def _write(folder: pathlib.Path, name: str, cells: list[tuple[str, str, str, float]]) -> None:
    rows = [dict(zip(("network", "case", "method", "auroc"), cell, strict=True)) for cell in cells]
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))


def test_detection_summary_takes_means_over_severities_networks_and_cases(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "adversarial", [
        ("resnet", "FGSM", "fastgrad", 0.6), ("densenet", "FGSM", "fastgrad", 0.8),
        ("resnet", "FGSM after JPEG", "fastgrad", 0.1), ("resnet", "FGSM", "labelled", 1.0),
        ("resnet", "FGSM", "energy", 0.4), ("densenet", "FGSM", "energy", 0.6),
    ])  # fmt: skip
    _write(tmp_path, "ood", [
        ("cifar10 resnet", "svhn", "fastgrad", 0.9), ("cifar10 resnet", "grey cifar10 (control)", "fastgrad", 0.1),
        ("mnist resnet", "scenes", "fastgrad", 1.0), ("cifar10 resnet", "svhn", "energy", 0.5),
        ("mnist resnet", "scenes", "energy", 0.8),
    ])  # fmt: skip
    _write(tmp_path, "corruption", [
        ("resnet", "fog/1", "fastgrad", 0.4), ("resnet", "fog/2", "fastgrad", 0.8),
        ("resnet", "frost/1", "fastgrad", 0.8), ("resnet", "fog/1", "energy", 0.5), ("resnet", "fog/2", "energy", 0.7),
        ("resnet", "frost/1", "energy", 0.6),
    ])  # fmt: skip
    table = readme.table("detection", tmp_path)
    # (0.7 + 0.9 + 1.0 + 0.6 + 0.8) / 5; fog is the mean of its severities.
    assert "| fastgrad | 0.700 | 0.900 | 1.000 | 0.700 | 0.800 | 0.600 (fog) |" in table
    assert "| energy | 0.500 | 0.500 | 0.800 | 0.600 | 0.600 | 0.500 (FGSM) |" in table
    assert "labelled" not in table
    assert "| labelled | 1.000 |" in readme.table("labelled", tmp_path)
    assert "fastgrad" not in readme.table("labelled", tmp_path)
    for name in ("adversarial", "ood", "corruption"):
        (tmp_path / f"{name}.json").rename(tmp_path / f"{name}-resnet18.json")
    assert readme.table("detection resnet18", tmp_path) == table


def test_factor_and_rate(folder: pathlib.Path) -> None:
    assert readme.value("network | net B=8 | vmap(grad) | faster", folder) == "8"
    assert readme.value("network | net B=8 | fastgrad | per second", folder) == "16"


@pytest.mark.parametrize("words", ["network", "network | net B=9 | fastgrad | ratio", "none | a | b | c"])
def test_an_unknown_value_is_refused(words: str, folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"value|one of"):
        readme.value(words, folder)


def test_a_peer_that_is_faster_is_named_at_the_top() -> None:
    slower = [dict(row, median_s=0.25) if row["implementation"] == "vmap(grad)" else row for row in CASES]
    assert standing.standing(CASES).startswith("fastgrad is ahead")
    assert standing.standing(slower) == "fastgrad is behind in: net B=8: vmap(grad) is 2.00 times faster."


def test_where_there_is_no_peer_nothing_is_claimed() -> None:
    assert standing.standing(CASES[:2]) == "No peer is measured here."


def test_another_revision_that_was_faster_does_not_stand_for_this_one() -> None:
    older = [*CASES, CASES[0] | {"implementation": "fastgrad @ abc", "median_s": 0.25}]
    assert standing.best(older) == CASES[0]
    assert standing.best(older[1:]) is None


def test_textbook_forms_are_named_apart() -> None:
    rows = [dict(row, implementation="closed form, textbook", median_s=0.25) for row in CASES[2:3]]
    text = standing.standing([*CASES[:2], *rows])
    assert text.startswith("fastgrad is ahead of every peer that keeps its accuracy.")
    assert "in 1 comparisons, by up to 2 times" in text


def test_a_method_that_lacks_a_case_is_in_no_mean(tmp_path: pathlib.Path) -> None:
    attacks = [("resnet", "FGSM", "fastgrad", 0.6), ("resnet", "FGSM", "energy", 0.5)]
    lone = ("resnet", "PGD", "fastgrad", 0.7)
    _write(tmp_path, "ood", [("cifar10 resnet", "svhn", method, 0.9) for method in ("fastgrad", "energy")])
    _write(tmp_path, "corruption", [("resnet", "fog/1", method, 0.9) for method in ("fastgrad", "energy")])
    _write(tmp_path, "adversarial", [*attacks, lone])
    with pytest.raises(ValueError, match="energy must have 1 numbers for 'PGD'"):
        readme.table("detection", tmp_path)
    _write(
        tmp_path,
        "adversarial",
        [*attacks, ("resnet", "PGD", "energy", 0.5), lone, ("resnet", "PGD", "LID", 0.8)],
    )
    with pytest.raises(ValueError, match="LID must have FGSM on resnet"):
        readme.table("labelled", tmp_path)
