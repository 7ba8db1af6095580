"""The public names and their signatures are those on record; the package's version stands in one place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import surface

import fastgrad

ROOT = Path(__file__).parent.parent


def test_names_and_signatures_are_those_on_record() -> None:
    recorded, found = json.loads(surface.RECORD.read_text()), surface.surface()
    assert found.keys() == recorded.keys()
    for module, entries in found.items():
        assert entries == recorded[module], f"{module}: if this is meant, run python tests/helpers/surface.py"


def test_the_reference_lists_the_public_modules() -> None:
    page = (ROOT / "docs" / "reference" / "index.md").read_text()
    listed = set(re.findall(r"^\| `(fastgrad[\w.]*)`", page, re.MULTILINE))
    assert listed == set(surface.MODULES)


def test_the_version_stands_in_one_place() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [fastgrad.__version__]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == fastgrad.__version__
    assert "version" not in re.findall(r"^(\w+) = ", (ROOT / "pyproject.toml").read_text().split("[tool")[0])
