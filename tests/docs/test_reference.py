"""Every public name has an entry in the reference."""

from __future__ import annotations

import json
import re
import runpy

import surface
from doc_pages import DOCS


def test_every_public_name_has_an_entry() -> None:
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    entries = set(re.findall(r"^\.\. (?:auto(?:function|class|exception|data)|py:data):: (\S+)$", pages, re.MULTILINE))
    whole = re.findall(r"^\.\. automodule:: (\S+)\n   :members:(.*)$", pages, re.MULTILINE)
    named = {f"{module}.{name.strip()}" for module, names in whole for name in names.split(",") if name}
    everything = {module for module, names in whole if not names}
    recorded = json.loads(surface.RECORD.read_text())
    for module in surface.MODULES:
        for name in recorded[module]:
            assert module in everything or f"{module}.{name}" in entries | named, f"{module}.{name}"


def test_no_entry_shows_a_python_object() -> None:
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    entries = re.findall(r"^\.\. autodata:: (\S+)\n(.*)$", pages, re.MULTILINE)
    assert entries
    assert not [name for name, options in entries if options.strip() != ":no-value:"]


def test_every_command_has_its_help() -> None:
    from fastgrad.commands.cli import COMMANDS

    page = (DOCS / "reference" / "deploy.md").read_text()
    assert set(re.findall(r"<!-- command: (\w+) -->", page)) == set(COMMANDS)


def test_every_function_with_a_rule_is_named() -> None:
    from fastgrad.layers import RULES

    table = runpy.run_path(str(DOCS / "conf.py"))["_functions"]()
    names = re.findall(r"`((?:F|torch|Tensor)\.\w+)`", table)
    assert len(set(names)) == len(RULES)
    assert {"F.linear", "F.conv2d", "torch.lstm", "F.max_pool2d"} <= set(names)


def test_explained_messages_are_those_of_the_code() -> None:
    page = (DOCS / "faq.md").read_text().split("## How many")[0]
    code = "".join(path.read_text() for path in sorted((DOCS.parent / "fastgrad").rglob("*.py")))
    joined = re.sub(r'"\n\s*f?"', "", code)
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    assert [m for m in messages if not all(part in joined for part in m.split(" ... "))] == []
