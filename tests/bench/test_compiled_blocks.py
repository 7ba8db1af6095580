"""Both forms of a model give the same results in every call, and none compiles anew."""

from __future__ import annotations

import pytest

from bench import compiled_blocks
from bench.report import pages


# The compiler reads what PyTorch warns of, and hides it unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_both_models_are_measured() -> None:
    found = list(compiled_blocks.measure("eager", (16, 6, 8, 1, 2), 3))
    assert [row["call"] for row in found] == list(compiled_blocks.CALLS)
    for row in found:
        assert row["error"] < 1e-5
        assert row["as written"] > 0
        assert row["compiled"] > 0
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        if row["call"] == row["base"]:
            assert row["over"] == {"as written": 1, "compiled": 1}


def test_the_page_says_the_records() -> None:
    row = {
        "call": "grad_sqnorm under record", "as written": 0.5, "compiled": 0.25, "ratio": 0.5, "quartiles": [0.4, 0.6],
        "over": {"as written": 1.25, "compiled": 1.5}, "base": "training step", "error": 2e-7,
    }  # fmt: skip
    head = {"machine": "here", "versions": {}, "revision": "abc", "parameters": 12345, "batch": 2, "length": 4}
    page = pages.page("compiled-blocks", {**head, "depth": 3, "rows": [row]}, [])
    assert page is not None
    line = "| grad_sqnorm under record | 500 ms | 250 ms | 0.50 (0.40 to 0.60) | training step | 1.25 | 1.50 | 2e-07 |"
    assert line in page
