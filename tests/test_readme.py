"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_python_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["features"].shape == (8, 62)
    assert names["norms"].shape == (8, 10)
    assert all(value.shape == (8,) for value in names["sqnorms"])
    assert names["uncertainty"].shape == (1,)
    assert "conv1.weight" in capsys.readouterr().out
