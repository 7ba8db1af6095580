"""The generated blocks of README and pages are those of ``bench/results``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.report import blocks
from bench.report.__main__ import DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_its_blocks_equal_the_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert blocks.BLOCK.findall(text), "no block, so nothing to keep up to date: take it off the list"
    stale = blocks.differing(text)
    assert not stale, f"run python -m bench.report; stale: {stale}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_no_value_ends_the_cell_that_it_stands_in(document: Path) -> None:
    rows = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert not [row for row in rows if "|" in "".join(re.findall("<!-- value: (.*?) -->", row))]
