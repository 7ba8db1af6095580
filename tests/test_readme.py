"""The README is short, its Python runs as printed, its links lead somewhere; the map of rooms is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from doc_pages import DOCS, run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_a_newcomer_reads_all_of_it() -> None:
    assert len(TEXT.splitlines()) <= 100


def test_its_python_runs_as_printed() -> None:
    names = run(README)
    assert names["R"].shape == (397, 10, 64)
    assert all(value.shape == (500,) for value in names["sqnorms"])
    assert names["gram"].shape == (500, 500)
    # The features are then of half precision and the layer is not.
    with torch.autocast("cpu", torch.bfloat16):
        norms, _ = names["introspect"](names["test"][:8])
    assert norms.shape == (8, 10)
    assert norms.isfinite().all()


def test_both_commands_stand_in_one_block() -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert 'pip install -e ".[demo]" && fastgrad demo' in block
    assert 'pip install -e ".[test]" && pytest' in block


def test_the_map_of_rooms_is_that_of_the_tree() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text().split("## Rooms")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)/`", page))
    rooms = {p.name for p in (ROOT / "fastgrad").iterdir() if (p / "__init__.py").exists()}
    inner = {p.name for p in (ROOT / "fastgrad" / "deploy").iterdir() if (p / "__init__.py").exists()}
    assert named == rooms | inner


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([\w-]*)\)", prose):
        assert (ROOT / target).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, anchor


def test_the_page_of_pypi_links_to_no_file() -> None:
    """PyPI shows neither the files of the repository nor their pictures."""
    assert not re.findall(r"\]\((?!http)", (DOCS / "pypi.md").read_text())
