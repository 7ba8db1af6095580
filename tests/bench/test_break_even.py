"""Every network and batch is measured with every tool, and the page says how many times fastgrad's each takes."""

from __future__ import annotations

from typing import Any

import pytest

from bench import break_even
from bench.micro.tasks import BCE, CE
from bench.report import pages


def test_every_tool_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "NETS", {"plain CNN 8x8": BCE, "GPT T=6": CE})
    found = list(break_even.measure(only="CNN", batches=[1, 3]))
    assert [(row["network"], row["batch"]) for row in found] == [("plain CNN 8x8", 1), ("plain CNN 8x8", 3)]
    for row in found:
        for tool in break_even.CALLS:
            assert row[tool]["seconds"] > 0
            assert row[tool]["peak_bytes"] > 0
    # vmap holds the gradients of all samples, a loop those of one.
    loop, together = ([row[tool]["peak_bytes"] for row in found] for tool in ("per-sample loop", "vmap(grad)"))
    assert together[1] > 2 * together[0]
    assert loop[1] < 2 * loop[0]
    assert [row["network"] for row in break_even.measure(only="GPT", batches=[2])] == ["GPT T=6"]


def test_a_ratio_above_one_is_ahead() -> None:
    def row(network: str, batch: int, *figures: tuple[float, int]) -> dict[str, Any]:
        cells = zip(break_even.CALLS, figures, strict=True)
        return {"network": network, "batch": batch, **{name: {"seconds": s, "peak_bytes": b} for name, (s, b) in cells}}

    rows = [
        row("b", 1, (1.0, 1024), (1.0, 1024), (1.0, 1024)), row("a", 64, (0.5, 1024), (1.0, 512), (0.25, 3072)),
        row("a", 8, (1.0, 1024), (1.0, 1024), (1.0, 1024)),
    ]  # fmt: skip
    page = pages.page("break-even", {"machine": "here", "versions": {}, "revision": "abc", "rows": rows}, [])
    assert page is not None
    lines = page.splitlines()
    at = lines.index("| a | 64 | 500 ms, 1 KiB | 2.00 | 0.50 | 0.50 | 3.00 |")
    assert [line.split(" | ")[0] for line in lines[at - 1 : at + 2]] == ["| a", "| a", "| b"]
