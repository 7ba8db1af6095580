"""The README is short, its Python runs as printed, its figures and its map are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_a_newcomer_reads_all_of_it() -> None:
    assert len(TEXT.splitlines()) <= 90


def test_its_python_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(README)
    assert names["answer"].risk.shape == names["flagged"].shape == (4,)
    assert names["second_opinion"].shape == names["norms"].shape == (256, 10)
    assert all(value.shape == (8,) for value in names["sqnorms"])


def test_its_contrasts_run_under_autocast() -> None:
    """The features are then of half precision and the layer is not."""
    names: dict[str, Any] = {}
    with torch.autocast("cpu", torch.bfloat16):
        exec(TEXT.split("```python\n")[1].split("\nH = ")[0], names)
    assert names["h"].dtype == names["z"].dtype == torch.bfloat16
    assert names["norms"].shape == (256, 10)
    assert names["norms"].isfinite().all()


def test_its_map_is_that_of_the_tree() -> None:
    named = set(re.findall(r"(\w+)/", TEXT.split("## Map of the code")[1].split("```")[1]))
    rooms = {p.name for p in (ROOT / "fastgrad").iterdir() if (p / "__init__.py").exists()}
    tops = {"tests", "bench", "docs", "examples"}
    inner = {p.name for p in (ROOT / "fastgrad" / "deploy").iterdir() if (p / "__init__.py").exists()}
    assert named == rooms | tops | inner


def test_its_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([\w-]*)\)", TEXT):
        assert (ROOT / target).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, anchor
