"""The notebooks are their pages, run in a fresh kernel, and hold pictures."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from doc_pages import DOCS

nbformat = pytest.importorskip("nbformat")
NAMES = ("introspection", "purview")


def build() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build_notebooks", DOCS / "notebooks" / "build.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_its_page(name: str) -> None:
    made = build()
    assert made.NAMES == NAMES
    kept = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    parts = [
        [(cell.cell_type, cell.source, cell.get("attachments")) for cell in cells]
        for cells in (kept.cells, made.notebook(name).cells)
    ]
    assert parts[0] == parts[1], "run: python docs/notebooks/build.py"
    shown = [output.get("data", {}) for cell in kept.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in data for data in shown)
    assert next(cell.source for cell in kept.cells if cell.cell_type == "code") == made.INSTALL


@pytest.mark.slow
# Of Jupyter: its client warns of paths, sockets and loops that it closes itself.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name: str) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = build().executed(name).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
