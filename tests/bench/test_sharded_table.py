"""Two ranks are measured for every call, and the page puts each beside its own rank's step."""

from __future__ import annotations

from bench import sharded
from bench.report import pages

CALLS = ["step of FSDP", "grad_sqnorm", "grad_gram", "grad_project"]


def test_both_ranks_are_measured() -> None:
    found = list(sharded.measure(sharded.Sizes(width=16, depth=1, batch=2, length=4, numbers=8)))
    assert [(row["call"], row["rank"]) for row in found] == [(call, rank) for rank in (0, 1) for call in CALLS]
    assert all(row["seconds"] > 0 for row in found)
    # A block's weights alone, unsharded: 12 of width squared.
    assert all(row["peak_bytes"] > 4 * 12 * 16**2 for row in found)


def test_ratios_are_to_the_same_rank() -> None:
    numbers = {0: [(1.0, 1024), (0.5, 2048), (2.0, 1024), (3.0, 512)], 1: [(2.0, 100), (1.0, 100), (1, 50), (4, 100)]}
    rows = [
        {"call": call, "rank": rank, "seconds": seconds, "peak_bytes": size}
        for rank, each in numbers.items() for call, (seconds, size) in zip(CALLS, each, strict=True)
    ]  # fmt: skip
    head = {"machine": "here", "versions": {}, "revision": "abc", "parameters": 1234567, "batch": 2, "length": 4}
    page = pages.page("sharded", {**head, "rows": rows}, [])
    assert page is not None
    assert "an encoder of 1,234,567 parameters" in page
    assert "| grad_sqnorm | 0 | 2 KiB | 2.00 | 500 ms | 0.50 |" in page
    assert "| grad_gram | 1 | 50 B | 0.50 | 1 s | 0.50 |" in page
