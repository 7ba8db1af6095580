"""The tables of the results page are those of ``bench/results``."""

from __future__ import annotations

from doc_pages import DOCS

from bench.report import blocks


def test_the_tables_equal_the_results() -> None:
    text = (DOCS / "results.md").read_text()
    assert len(blocks.BLOCK.findall(text)) >= 7
    stale = blocks.differing(text)
    assert not stale, f"run python -m bench.report; stale: {stale}"
