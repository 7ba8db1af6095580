"""Tools are called exact, part, wrong or refused by what they return, and the page says what the records say."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.conformance import __main__ as command
from bench.conformance import models, task, tools
from bench.report import conformance, pages

MIXED = "samples that depend on each other"


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def scaled(which: str, factor: float) -> Any:
    """Return a tool that is fastgrad but for a factor on one of its results."""

    def tool(one: task.Task) -> tools.Calls:
        true = tools.ours(one)

        def norms() -> tools.Norms:
            found = dict(true.norms())
            return {k: v * (factor if which == "norms" and k == list(found)[-1] else 1) for k, v in found.items()}

        def gram() -> Tensor:
            return true.gram() * (factor if which == "products" else 1)

        def rows() -> Tensor:
            assert true.rows is not None
            return true.rows() * (factor if which == "projections" else 1)

        return tools.Calls(norms, gram, true.covered, rows)

    return tool


def partial_tool(one: task.Task) -> tools.Calls:
    """Give nothing for the last layer."""
    kept = {name: p for name, p in one.parameters.items() if not name.startswith("last")}

    def gradients() -> dict[str, Tensor]:
        rows = [torch.autograd.grad(loss, list(kept.values()), retain_graph=True) for loss in one.losses()]
        return dict(zip(kept, map(torch.stack, zip(*rows, strict=True)), strict=True))

    return tools.Calls(
        lambda: tools.squares(gradients()), lambda: tools.products(gradients().values()), lambda: set(kept)
    )  # fmt: skip


def single(one: task.Task) -> tools.Calls:
    if next(one.model.parameters()).dtype == torch.float64:
        raise TypeError("float64 is not supported")
    return tools.ours(one)


def refuses(one: task.Task) -> tools.Calls:
    raise NotImplementedError("no rule for this layer\nand a second line")


def hangs(one: task.Task) -> tools.Calls:
    while True:
        pass


def waits(one: task.Task) -> tools.Calls:
    time.sleep(60)
    raise AssertionError


TOOLS: dict[str, Any] = {
    "ours": tools.ours, "part": partial_tool, "single": single, "refuses": refuses, "hangs": hangs, "waits": waits,
    "dies": lambda one: os._exit(1),
    **{which: scaled(which, 1 + 1e-6) for which in ("norms", "products", "projections")},
}  # fmt: skip
NAME = "torch linear layer used three times"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TOOLS", TOOLS)
    monkeypatch.setattr(command, "REPEATS", 1)


@pytest.mark.parametrize(
    ("tool", "verdict", "dtype"),
    [("ours", "exact", "float64"), ("single", "exact", "float32"), ("part", "part", "float64"),
     ("norms", "wrong", "float64"), ("products", "wrong", "float64"), ("projections", "wrong", "float64")],
)  # fmt: skip
def test_verdicts(tool: str, verdict: str, dtype: str) -> None:
    row = command.cell(NAME, tool)
    assert (row["verdict"], row["dtype"]) == (verdict, dtype)
    assert row["covered"] == (1 if tool != "part" else pytest.approx(1600 / 1930))
    for which in ("norms", "products", "projections"):
        if tool == which:
            assert row[which] == pytest.approx(1e-6, rel=0.01 if which != "projections" else 1)
        else:
            assert row.get(which, 0) < command.allowed(getattr(torch, dtype)) / 10
    assert row["seconds"] > 0
    assert row["steps"] > 0
    assert row["peak_bytes"] > 0
    assert row["step_bytes"] > 0


@pytest.mark.parametrize(
    ("tool", "note"),
    [("refuses", "NotImplementedError: no rule for this layer"), ("dies", "the process died"),
     ("hangs", "no result within 1 s"), ("waits", "no result within 1 s")],
)  # fmt: skip
def test_a_crash_costs_one_cell(tool: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SECONDS", 1)
    monkeypatch.setattr(command, "WAITED", 1 if tool == "waits" else 60)
    assert command.alone(NAME, tool) == {"model": NAME, "tool": tool, "verdict": "refused", "note": note}


def test_samples_that_mix_are_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, MIXED, (Mixed, lambda batch: torch.randn(batch, 4)))
    with pytest.raises(ValueError, match="gradients of samples must add up to that of the batch"):
        task.Loop(task.Task(MIXED, 3))


def record(model: str, tool: str, verdict: str, time: float = 1.0, memory: int = 100, **more: Any) -> dict[str, Any]:
    timed = {"steps": time, "peak_bytes": memory, "step_bytes": 100, "covered": 0.5, "norms": 1e-15, "products": 1e-16}
    return {"model": model, "tool": tool, "verdict": verdict, **({} if verdict == "refused" else timed), **more}


ROWS = [
    record("a", "fastgrad", "exact"), record("a", "p", "exact", 2.0, 400), record("a", "q", "exact", 4.0, 200),
    record("b", "fastgrad", "exact", 2.0), record("b", "p", "exact", 16.0, 100),
    record("b", "q", "wrong", 0.1, 1, norms=0.25),
    record("c", "fastgrad", "exact"), record("c", "p", "part", 0.1, 1), record("c", "q", "refused", note="KeyError: x"),
]  # fmt: skip


def test_means_are_geometric_over_exact_models() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in conformance.means(ROWS).splitlines()]
    assert lines[0] == ["peer", "models", "time", "memory"]
    assert lines[2] == ["p", "2", "4", "2"]  # 2 and 8 times, 4 and 1 times
    assert lines[3] == ["q", "1", "4", "2"]
    assert lines[4] == ["the best of these, model by model", "2", "4", "1.41"]


def test_the_page_counts_verdicts() -> None:
    head = {"machine": "here", "versions": {}, "revision": "abc", "batch": 4, "limit_s": 30, "allowed": 1e-8}
    page = pages.page("conformance", {**head, "rows": ROWS}, [])
    assert page is not None
    for line in (
        "| fastgrad | 3 | 0 | 0 | 0 |", "| p | 2 | 1 | 0 | 0 |", "| q | 1 | 0 | 1 | 1 |",
        "| b | exact 1e-15 | exact 1e-15 | wrong 2e-01 |", "| c | exact 1e-15 | part 50 % 1e-15 | refused |",
        "| b | 2.0, 1.0 | 16.0, 1.0 | - |", "| c | 1.0, 1.0 | - | - |", "| c | q | KeyError: x |",
    ):  # fmt: skip
        assert line in page


def test_at_least_thirty_models_are_public() -> None:
    packages = [name.split()[0] for name in models.MODELS]
    assert len(packages) > 30
    assert min(packages.count(package) for package in ("timm", "torchvision", "transformers")) >= 10
