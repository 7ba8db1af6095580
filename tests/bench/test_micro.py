"""Cases are checked before they are timed; what is wrong is not timed."""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
from python_process import run_python

from bench.clock import peak_bytes
from bench.micro import test_micro as micro
from bench.micro.cases import cases
from bench.micro.gram import GramTask
from bench.micro.layer_peers import OfLayers, covered, norm_errors
from bench.micro.models import NETWORKS
from bench.micro.tasks import LABELS
from bench.registry import SIZES, Case, Implementation

ROOT = pathlib.Path(__file__).parents[2]
CPU = "cpu"


def _case(error: float) -> Case:
    made = [Implementation("fastgrad", lambda: lambda: 1, lambda out: error, 1e-5)]
    return Case("table", "case B=1", "fastgrad", ("fastgrad", "peer"), lambda device: made)


@pytest.mark.parametrize("error", [1e-4, float("nan"), float("inf")])
def test_a_wrong_result_is_not_timed(error: float) -> None:
    with pytest.raises(ValueError, match=r"relative error must be at most 1\.0e-05 to be timed; it was"):
        _case(error).ready("fastgrad", CPU)


@pytest.mark.parametrize(
    ("name", "outcome", "note"),
    [("fastgrad", KeyError, "KeyError: 'no such layer'"), ("peer", pytest.skip.Exception, "KeyError: 'no such layer'"),
     ("absent", pytest.skip.Exception, None)],
)  # fmt: skip
def test_errors_have_rows_and_absent_peers_none(name: str, outcome: type[BaseException], note: str | None) -> None:
    def prepare() -> object:
        raise KeyError("no such layer")

    made = [Implementation(name, prepare, float, 1.0) for name in ("fastgrad", "peer")]
    case = Case("table", "case B=1", "peer", ("fastgrad", "peer", "absent"), lambda device: made)
    measured: dict[str, list[dict[str, object]]] = {"table": []}
    with pytest.raises(outcome):
        micro.test_micro(None, CPU, measured, case, name)
    assert [row["note"] for row in measured["table"]] == ([] if note is None else [note])


@pytest.mark.parametrize("size", SIZES, ids="size {}".format)
def test_names_of_cases_are_unique_and_hold_their_yardstick(size: str) -> None:
    found = cases(size)
    assert len({(c.table, c.name) for c in found}) == len(found) > 5
    assert all(c.against in c.names and any(n.startswith("fastgrad") for n in c.names) for c in found)


@pytest.mark.parametrize("case", cases("tiny"), ids=lambda case: case.name)
def test_implementations_are_those_that_are_named(case: Case) -> None:
    made = case.implementations(CPU)
    assert set(made) <= set(case.names)
    assert case.against in made
    assert any(name.startswith("fastgrad") for name in made)


@pytest.mark.parametrize("table", ["network", "gram"])
def test_peers_are_checked_on_their_layers(table: str) -> None:
    known = ["0", "2"]  # of six convolutions and a head
    task = GramTask(NETWORKS["plain CNN 8x8"], 3, CPU, LABELS)
    each = zip(*(task.double().gradient(i) for i in range(3)), strict=True)
    gradients = dict(zip(dict(task.model.named_parameters()), map(torch.stack, each), strict=True))
    own = [[g.flatten(1) for name, g in gradients.items() if name.split(".")[0] == layer] for layer in known]
    if table == "network":
        value, error = torch.stack([sum(g.square().sum(1) for g in layer) for layer in own], 1), norm_errors
    else:
        value, error = sum(g @ g.mT for layer in own for g in layer), lambda task, found: task.layers_error(found)
    assert error(task, OfLayers(known, value)) < 1e-10
    assert error(task, OfLayers(known, 1.01 * value)) == pytest.approx(0.01)
    assert error(task, OfLayers(["0", "4"], value)) > 1e-3
    numbers = sum(p.numel() for p in task.model.parameters())
    assert covered(task, OfLayers(known, value)) == sum(g[0].numel() for layer in own for g in layer) / numbers


def test_peak_memory_is_that_of_the_call_alone() -> None:
    case = next(c for c in cases("tiny") if c.table == "rows")
    assert peak_bytes(case.ready("stored rows", CPU), CPU) == 4 * 3 * 7


def test_memory_freed_by_a_call_does_not_count() -> None:
    kept = []

    def call() -> None:
        kept.clear()
        kept.append(torch.ones(1000))

    assert [peak_bytes(call, CPU) for _ in range(3)] == [4000] * 3


def test_a_run_writes_its_results(tmp_path: pathlib.Path) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/micro", "--size", "tiny", "-k", "rows", "--out"]
    (tmp_path / "rows.json").write_text('{"cases": [{"case": "of another revision"}]}')
    # Within a process of the whole suite the plugin would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run_python(*command, tmp_path, cwd=ROOT, env=environment)
    document = json.loads((tmp_path / "rows.json").read_text())
    by_name = {row["implementation"]: row for row in document["cases"]}
    assert set(by_name) == {"fastgrad", "stored rows", "rows written, then linear"}
    assert all(row["correct"] and row["median_s"] > 0 and row["peak_bytes"] > 0 for row in by_name.values())
    assert by_name["stored rows"]["ratio"] == 1.0
    assert document["floor"]["copy_bytes_per_s"] > 0


def test_paired_processes_choose_packages() -> None:
    assert run_python("-c", "import sys, bench.paired; print('fastgrad' in sys.modules)", cwd=ROOT).strip() == "False"
