"""Every recipe for contributors, followed as written in a copy of the repository, gives what it says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from doc_pages import DOCS, Block, blocks, parameters, programs
from python_process import run_python

ROOT = DOCS.parent
RECIPES = sorted((DOCS / "contributing").glob("*.md"))
RUN = "import pathlib, sys, doc_pages; doc_pages.run(pathlib.Path(sys.argv[1]))"


def apply(block: Block, root: Path) -> None:
    """Write the file that a block is, or change it as a ``diff`` says: each part of it is found once."""
    path = root / block.title
    if block.language != "diff":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return
    text = path.read_text()
    for part in block.text.split("@@\n")[1:]:
        lines = [line or " " for line in part.splitlines()]
        before, after = ("".join(f"{x[1:]}\n" for x in lines if x[0] in " " + sign) for sign in "-+")
        assert text.count(before) == 1, f"{block.title} has changed; the recipe looks for\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


@pytest.mark.parametrize("page", parameters(RECIPES))
def test_the_recipe_works_as_written(page: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "repository", tmp_path / "folder"
    folder.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "results")
    for name in ("fastgrad", "kernels", "tests", "bench", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            # fastgrad/kernels is a link to kernels/.
            shutil.copytree(source, copy / name, symlinks=True, ignore=leave_out)
        else:
            shutil.copy(source, copy / name)
    changed = [block for block in blocks(page) if block.title is not None]
    for block in changed:
        apply(block, copy)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "tests" / "helpers")))}
    tests = [copy / block.title for block in changed if block.title.startswith("tests/")]
    assert programs(page) or tests, "a recipe ends in something that runs"
    if programs(page):
        run_python("-c", RUN, page, cwd=folder, env=environment)
    if tests:
        run_python("-m", "pytest", "-q", *tests, cwd=copy, env=environment)
