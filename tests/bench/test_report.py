"""Pages, README and documentation say what bench/results says."""

from __future__ import annotations

import json
import pathlib

import pytest
from PIL import Image

from bench.report import __main__ as command
from bench.report import blocks, pages, speed

ROOT = pathlib.Path(__file__).parents[2]
CASES = [
    {"case": case, "implementation": name, "median_s": median, "p10_s": median, "p90_s": median, "peak_bytes": 2048,
     "relative_to": "training step", "ratio": ratio, "correct": median is not None, "error": None, "note": note}
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
    rows = [
        {"network": "n", "case": "c", "method": m, "auroc": a, "spread": 0.01, "seeds": 3}
        for m, a in (("fastgrad", 0.9), ("energy", 0.5))
    ]
    (tmp_path / "ood.json").write_text(json.dumps({"machine": "here", "rows": rows}))
    return tmp_path


def test_pages_and_blocks_say_what_the_results_say() -> None:
    found = command.stale()
    assert not found, f"run python -m bench.report; stale: {found}"


def test_a_page_is_a_template_over_its_results(folder: pathlib.Path) -> None:
    text = pages.write("network", folder).read_text()
    assert "# Benchmark: network\n\nhere; torch 2; revision abc; seed 0." in text
    assert "| net B=8 | vmap(grad) | 4 s | 4 s to 4 s | 2 KiB | 4 | training step |  |" in text
    assert (
        "| net B=8 | BackPACK BatchL2Grad | refused | - | 2 KiB | - | training step | TypeError: batch norm |"
        in text
    )
    assert text.endswith("![network](network.png)\n")
    with Image.open(folder / "network.png") as image:
        assert image.width <= 900
    assert command.stale(folder, []) == []
    (folder / "network.md").write_text(text.replace("4 s", "3 s"))
    assert command.stale(folder, []) == ["network.md"]


def test_a_changed_figure_is_found(folder: pathlib.Path) -> None:
    text = "a\n<!-- table: network -->\n<!-- end -->\n"
    text += "b <!-- value: network | net B=8 | fastgrad | ratio | .2f --><!-- end -->"
    filled = blocks.fill(text, folder)
    assert "| net B=8 | 500 ms | 2 KiB | 0.50 | 1.00 | 8 | refused | wrong |" in filled
    assert filled.endswith("-->0.50<!-- end -->")
    assert blocks.differing(filled, folder) == []
    assert blocks.fill(filled, folder) == filled
    assert blocks.differing(filled.replace("500 ms", "400 ms"), folder) == ["table: network"]
    assert blocks.differing(filled.replace("-->0.50<", "-->0.49<"), folder)


def test_detection_rows_become_cases_against_methods(folder: pathlib.Path) -> None:
    assert "| n | c | 0.900 ± 0.010 | 0.500 ± 0.010 |" in blocks.table("ood", folder)


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
    table = blocks.table("detection", tmp_path)
    # (0.7 + 0.9 + 1.0 + 0.6 + 0.8) / 5; fog is the mean of its severities.
    assert "| fastgrad | 0.700 | 0.900 | 1.000 | 0.700 | 0.800 | 0.600 (fog) |" in table
    assert "| energy | 0.500 | 0.500 | 0.800 | 0.600 | 0.600 | 0.500 (FGSM) |" in table
    assert "labelled" not in table
    assert "| labelled | 1.000 |" in blocks.table("labelled", tmp_path)
    assert "fastgrad" not in blocks.table("labelled", tmp_path)
    for name in ("adversarial", "ood", "corruption"):
        (tmp_path / f"{name}.json").rename(tmp_path / f"{name}-resnet18.json")
    assert blocks.table("detection resnet18", tmp_path) == table


def test_factor_and_rate(folder: pathlib.Path) -> None:
    assert blocks.value("network | net B=8 | vmap(grad) | faster", folder) == "8"
    assert blocks.value("network | net B=8 | fastgrad | per second", folder) == "16"


@pytest.mark.parametrize("words", ["network", "network | net B=9 | fastgrad | ratio", "none | a | b | c"])
def test_an_unknown_value_is_refused(words: str, folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"value|one of"):
        blocks.value(words, folder)


def test_a_peer_that_is_faster_is_named_at_the_top() -> None:
    slower = [dict(row, median_s=0.25) if row["implementation"] == "vmap(grad)" else row for row in CASES]
    assert speed.standing(CASES).startswith("fastgrad is ahead")
    assert speed.standing(slower) == "fastgrad is behind in: net B=8: vmap(grad) is 2.00 times faster."


def test_where_there_is_no_peer_nothing_is_claimed() -> None:
    assert speed.standing(CASES[:2]) == "No peer is measured here."


def test_textbook_forms_are_named_apart() -> None:
    rows = [dict(row, implementation="closed form, textbook", median_s=0.25) for row in CASES[2:3]]
    text = speed.standing([*CASES[:2], *rows])
    assert text.startswith("fastgrad is ahead of every peer that keeps its accuracy.")
    assert "is faster in 1 comparisons, by up to 2 times" in text


def test_a_method_that_lacks_a_case_is_in_no_mean(tmp_path: pathlib.Path) -> None:
    attacks = [("resnet", "FGSM", "fastgrad", 0.6), ("resnet", "FGSM", "energy", 0.5)]
    lone = ("resnet", "PGD", "fastgrad", 0.7)
    _write(tmp_path, "ood", [("cifar10 resnet", "svhn", method, 0.9) for method in ("fastgrad", "energy")])
    _write(tmp_path, "corruption", [("resnet", "fog/1", method, 0.9) for method in ("fastgrad", "energy")])
    _write(tmp_path, "adversarial", [*attacks, lone])
    with pytest.raises(ValueError, match="energy must have 1 numbers for 'PGD'"):
        blocks.table("detection", tmp_path)
    _write(
        tmp_path,
        "adversarial",
        [*attacks, ("resnet", "PGD", "energy", 0.5), lone, ("resnet", "PGD", "LID", 0.8)],
    )
    with pytest.raises(ValueError, match="LID must have FGSM on resnet"):
        blocks.table("labelled", tmp_path)
