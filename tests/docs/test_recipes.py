"""Every recipe for contributors, followed as written in a copy of the repository, gives what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, Block, blocks, parameters, programs

ROOT = DOCS.parent
RECIPES = sorted(page for page in (DOCS / "contributing").glob("*.md") if page.stem != "site")
RUN = "import pathlib, sys, doc_pages; doc_pages.run(pathlib.Path(sys.argv[1]))"


def apply(block: Block, root: Path) -> None:
    """Write the file that a block is, or change it as a ``diff`` says: each part of it is found once."""
    assert block.title is not None
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
    commands = [[sys.executable, "-c", RUN, str(page)]] if programs(page) else []
    tests = [block.title for block in changed if (block.title or "").startswith("tests/")]
    if tests:
        commands.append([sys.executable, "-m", "pytest", "-q", *(str(copy / str(test)) for test in tests)])
    assert commands, "a recipe ends in something that runs"
    for command in commands:
        done = subprocess.run(
            command, cwd=copy if "pytest" in command else folder, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
