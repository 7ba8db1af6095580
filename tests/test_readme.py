"""The README is short, its Python runs as printed, its figures and its map are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_a_newcomer_reads_all_of_it() -> None:
    assert len(TEXT.splitlines()) <= 120


def test_its_python_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(README)
    assert names["uncertainty"].shape == (4,)
    assert all(value.shape == (8,) for value in names["sqnorms"])


def test_detection_figures_are_those_of_the_results() -> None:
    table = (ROOT / "docs" / "results.md").read_text().split("<!-- table: detection -->")[1]
    heads = [cell.strip() for cell in next(line for line in table.splitlines() if "|" in line).split("|")]
    place = heads.index("all cases")
    shown = {
        "fastgrad": "fastgrad (.\\d+)",
        "KNN": "nearest neighbours (.\\d+)",
        "energy": "energy (.\\d+)",
        "softmax": "softmax (.\\d+)",
        "without gradients (control)": "without them it is (.\\d+)",
    }
    claim = next(line for line in TEXT.splitlines() if "Mean AUROC" in line)
    for method, words in shown.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        found = re.search(words, claim)
        assert found is not None, method
        assert f"0{found[1]}" == row.split("|")[place].strip(), method


def test_its_map_is_that_of_the_tree() -> None:
    named = set(re.findall(r"^([\w./]+)  ", TEXT.split("## Map")[1], re.MULTILINE))
    for path in named:
        assert (ROOT / path).exists(), path
    rooms = {f"fastgrad/{p.name}/" for p in (ROOT / "fastgrad").iterdir() if p.is_dir()}
    assert rooms - {"fastgrad/__pycache__/", "fastgrad/kernels/"} <= named


def test_its_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([\w-]*)\)", TEXT):
        assert (ROOT / target).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, (
                anchor
            )
