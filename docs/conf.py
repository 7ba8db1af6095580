"""How Sphinx builds the site: ``sphinx-build -W --keep-going -b html docs build/site``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import fastgrad  # noqa: E402
from fastgrad.challenges import CHALLENGES  # noqa: E402
from fastgrad.commands.cli import COMMANDS  # noqa: E402
from fastgrad.layers import RULES  # noqa: E402

project = "fastgrad"
author = "the fastgrad maintainers"
version = release = fastgrad.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fastgrad {version}"
html_show_copyright = False
html_copy_source = False
# Nothing is loaded from elsewhere, so that the site builds and reads offline.
html_css_files = ["site.css"]
html_static_path = ["_static"]
# The page that PyPI shows.
exclude_patterns = ["pypi.md"]

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3
# `output` and `about` are what a page's code printed, see contributing/parts-and-tables.md.
suppress_warnings = ["misc.highlighting_failure"]
# A name in single backticks leads to its entry where there is one.
default_role = "py:obj"
autodoc_typehints = "signature"
# Shown by name: written out they fill lines.
_ALIASES = (
    "Array",
    "ArrayLike",
    "Blocks",
    "InputGradient",
    "Inputs",
    "Pairs",
    "RuleFunction",
)
autodoc_type_aliases = {name: name for name in (*_ALIASES, "NDArray", "Target", "Unsupported")}
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = True

RESULTS = DOCS.parent / "bench" / "results"


def setup(app: Any) -> None:
    """Bring what the pages take from outside of docs/."""
    measured = DOCS / "measured"
    shutil.rmtree(measured, ignore_errors=True)
    measured.mkdir()
    for path in RESULTS.glob("*.png"):
        shutil.copy(path, measured / path.name)
    for path in RESULTS.glob("*.md"):
        # Their thousands of numbers would drown every search.
        (measured / path.name).write_text("---\nnosearch: true\n---\n" + path.read_text())
    app.connect("source-read", _read)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _by_name)


def _skip(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn adds to its estimators."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def _by_name(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Show an alias in a union by its name, not as Sphinx's own wrapper of it."""
    plain = [text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, result)]
    return plain[0], plain[1]


def _read(app: Any, name: str, source: list[str]) -> None:
    """Lead links into ``bench/results``, which work in a checkout, to the copies; fill in help texts."""
    here = os.path.relpath("measured", os.path.dirname(name) or ".")
    text = re.sub(r"\]\((?:\.\./)+bench/results/", f"]({here}/", source[0])
    # A block that is a file is shown under its name.
    text = re.sub(r'^```(\w+) title="([^"]*)"$', r"`\2`\n\n```\1", text, flags=re.MULTILINE)
    text = text.replace("<!-- functions -->", _functions()).replace("<!-- challenges -->", _challenges())
    source[0] = re.sub(r"<!-- command: (\w+) -->", lambda match: f"```text\n{_help(match[1])}```", text)


def _functions() -> str:
    """Return the functions that have a rule as a table, a row for each module of rules."""
    rows: dict[str, list[str]] = {}
    for function, rule in RULES.items():
        module = inspect.getmodule(getattr(rule, "func", rule))
        about = (inspect.getdoc(module) or "").partition("\n")[0].replace("``", "`")
        rows.setdefault(about, []).append(f"`{_name(function)}`")
    lines = [f"| {', '.join(names)} | {about} |" for about, names in rows.items()]
    return "\n".join(["| Functions | |", "| --- | --- |", *lines])


def _name(function: Any) -> str:
    """Return the name by which a function is reached, in the first of these places."""
    for place, members in (("F", vars(F)), ("torch", vars(torch)), ("Tensor", vars(torch._C.TensorBase))):
        for name, value in members.items():
            if value is function:
                return f"{place}.{name}"
    raise ValueError(f"a rule must be of a function of PyTorch; one was of {function!r}")


def _challenges() -> str:
    """Return the kinds of challenges of images as a table."""
    rows = []
    for name, kind in CHALLENGES.items():
        strengths = ", ".join(f"{strength:.3g}" for strength in kind.strengths)
        rows.append(f"| `{name}` | {kind.family} | {strengths} | {'yes' if kind.jpeg else ''} |")
    return "\n".join(["| Kind | Family | Strengths | JPEG after |", "| --- | --- | --- | --- |", *rows])


def _help(name: str) -> str:
    module, _, line = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"fastgrad {name}",
        description=line,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=90),
    )
    importlib.import_module(module).add_arguments(parser)
    return parser.format_help()
