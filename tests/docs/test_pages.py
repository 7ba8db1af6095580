"""Every page runs as printed, offline, and prints what it says it prints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from deploy_models import export_tiny
from doc_pages import DOCS, SLOW, parameters, programs, run

# Recipes change the repository, and pages of ten minutes have commands: other files here follow them.
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent.name != "contributing" and not page.stem.startswith("ten-minutes") and programs(page)
]


def test_there_are_pages_to_run() -> None:
    assert len(PAGES) >= 9
    assert {page.stem for page in DOCS.rglob("*.md")} >= SLOW


def test_no_line_begins_with_a_value() -> None:
    """A comment at the beginning of a line ends the paragraph."""
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    assert [page for page in pages if re.search(r"\S\n\s*<!-- value: ", page.read_text())] == []


# Of Opacus' accountant: the order that bounds best is the largest it tries.
@pytest.mark.filterwarnings("ignore:Optimal order is the")
# Of Lightning: it asks PyTorch in an old way, and advises more workers.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
# Of PyTorch: the first forward-mode derivative scripts functions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("page", parameters(PAGES))
def test_the_page_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Path) -> None:
    if "<!-- needs: model.pt2 -->" in page.read_text():
        shutil.copy(export_tiny(exports, "tiny.pt2"), tmp_path / "model.pt2")
    for package, version in re.findall(r"^<!-- needs: (\w+)(?: ([\d.]+))? -->$", page.read_text(), re.MULTILINE):
        pytest.importorskip(package, minversion=version or None)
    monkeypatch.chdir(tmp_path)
    run(page)
