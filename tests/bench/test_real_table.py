"""The table of photographs leaves an attack out that misleads nobody, and says so."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("foolbox")
pytest.importorskip("imagecorruptions")
pytest.importorskip("pytorch_ood")

from bench.paper import own
from bench.paper.draws import CASES, CONTROL, DRAWS
from bench.paper.table import Options
from bench.paper.tables import real
from fastgrad.detector.budget import Report

EMPTY = "DeepFool after JPEG"


@pytest.mark.parametrize("network", [None, "efficientnet-lite1"])
def test_a_case_without_images_is_named_and_in_no_mean(network: str | None, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    methods = [*map(own.named, own.BUDGETS), "softmax"]
    report = Report((), 1.2, (1.0, 1.0), None).to_json()

    def scores(shift: float) -> dict[str, Any]:
        return {method: rng.normal(shift, 1, 40) for method in methods}

    draw = SimpleNamespace(name="draw 1", number=0, network="net", sizes=DRAWS[0], right=np.ones(4, bool))
    one = {
        "scores": {"clean": scores(0)} | {name: scores(1) for name in CASES if name != EMPTY},
        "reports": dict.fromkeys(methods, report),
        "prices": dict.fromkeys(methods, 1.0),
    }
    options = Options(data=tmp_path, out=tmp_path, cache=tmp_path, network=network)
    page = real.write(options, [SimpleNamespace(name="draw 1", draw=draw)], [one])
    assert f"No image of {EMPTY} misleads it: left out of every mean." in page.sections[0][0]
    own_rows = [row for row in page.rows if row.get("method") == "softmax" and "auroc" in row]
    cases = {row["case"]: row["auroc"] for row in own_rows if "draw" in row}
    assert set(cases) == set(CASES) - {EMPTY}
    means = {row["case"]: row["auroc"] for row in own_rows if "draw" not in row}
    group = [name for name, kind in CASES.items() if kind == CASES[EMPTY] and name != EMPTY]
    # Each figure is rounded to four digits.
    every = [value for name, value in cases.items() if name != CONTROL]
    assert means["mean of all"] == pytest.approx(np.mean(every), abs=1e-4)
    assert means[f"mean of {CASES[EMPTY]}"] == pytest.approx(np.mean([cases[n] for n in group]), abs=1e-4)
