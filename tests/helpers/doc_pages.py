"""Pages of the documentation as programs: their blocks of code, run in the order in which a reader meets them."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


#: Pages that take more than some seconds, or repeat what another one shows: the documentation's own build runs them.
SLOW = {
    "detection", "file-and-server", "first-score", "index", "introspection",
    "million-images", "other-models", "production", "parts-and-tables", "what-it-finds",
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block: its language, the file that it is, its text and the line where that begins."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    content = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        yield Block(found[1], found[2], found[3], content.count("\n", 0, found.start(3)) + 1)


def parameters(pages: Iterable[Path]) -> list[Any]:
    """Return parameters of a test for each page, marked where it is slow."""
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in pages]


def programs(page: Path) -> list[Block]:
    """The blocks of a page that are Python to be run."""
    return [block for block in blocks(page) if block.language == "python" and block.title is None]


def run(page: Path) -> dict[str, Any]:
    """Run the ``python`` blocks of a page in one namespace.

    An ``output`` block is what the block before it printed; in an ``about`` block a number with a decimal point may be
    off by one of its last digit, since training differs from machine to machine.

    Returns:
        The namespace, for further checks.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    try:
        for block in blocks(page):
            if block.language == "python" and block.title is None:
                text = io.StringIO()
                # Errors name the page and the line in it.
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                with contextlib.redirect_stdout(text):
                    exec(code, names)
                printed = text.getvalue()
            elif block.language == "output":
                assert printed == block.text, f"{page.name}, line {block.line}: printed\n{printed}"
            elif block.language == "about":
                assert _alike(printed, block.text), f"{page.name}, line {block.line}: printed\n{printed}"
    finally:
        # A page that fails half way has not stopped its server.
        for value in names.values():
            if isinstance(value, subprocess.Popen) and value.poll() is None:
                value.kill()
                value.communicate()
    return names


def _alike(printed: str, expected: str) -> bool:
    number = re.compile(r"\d+\.\d+")
    if number.sub("#", printed).split() != number.sub("#", expected).split():
        return False
    pairs = zip(number.findall(printed), number.findall(expected), strict=True)
    # The distance of two decimals is a float's rounding more than what it says.
    return all(abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(b.partition(".")[2]) for a, b in pairs)
