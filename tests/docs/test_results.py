"""The tables of the results page are those of ``bench/results``."""

from __future__ import annotations

from doc_pages import DOCS

from bench.report import readme


def test_the_tables_equal_the_results() -> None:
    text = (DOCS / "results.md").read_text()
    assert len(readme.BLOCK.findall(text)) >= 7
    stale = readme.differing(text)
    assert not stale, f"run python -m bench.report.readme --file docs/results.md; out of date: {stale}"
