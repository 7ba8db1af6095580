"""The README is short, its Python runs as printed, its links lead somewhere; the map of rooms is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from doc_pages import DOCS
from torch import nn
from torch.nn.functional import cross_entropy

import fastgrad

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_a_newcomer_reads_all_of_it() -> None:
    assert len(TEXT.splitlines()) <= 80
    assert len(re.sub("<!--.*?-->", "", TEXT).split()) <= 600


def test_its_python_runs_on_another_model() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    names = {"model": model, "images": torch.rand(60, 1, 8, 8), "labels": torch.arange(60) % 3}
    names["new_images"] = torch.rand(5, 1, 8, 8)
    exec(code, names)
    assert names["answer"].risk.shape == (5,)


def test_both_sides_of_its_diff_give_the_same_norms() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    found = {}
    for side in "-+":
        names = {"model": model, "x": torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()}
        names |= {"y": torch.arange(6) % 3, "torch": torch, "fastgrad": fastgrad, "cross_entropy": cross_entropy}
        exec("\n".join(line[1:] for line in diff.splitlines() if line.startswith(side)), names)
        found[side] = names["norms"]
    torch.testing.assert_close(found["+"], found["-"], rtol=1e-12, atol=0)


def test_both_commands_stand_in_one_block() -> None:
    block, *_ = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
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
