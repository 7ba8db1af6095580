"""What the site takes from outside of docs/: the measured tables and figures, and the help of the commands."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fastgrad.commands.cli import COMMANDS

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add every table and figure of ``bench/results`` as a page of the folder ``measured``."""
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*.png")]):
        files.append(File.generated(config, f"measured/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links into ``bench/results``, which work in a checkout, to the folder ``measured``; fill in help texts."""
    here = os.path.relpath("measured", os.path.dirname(page.file.src_uri) or ".")
    markdown = re.sub(r"\]\((?:\.\./)+bench/results/", f"]({here}/", markdown)
    return re.sub(r"<!-- command: (\w+) -->", lambda match: f"```text\n{_help(match[1])}```", markdown)


def _help(name: str) -> str:
    module, _, line = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"fastgrad {name}",
        description=line,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    importlib.import_module(module).add_arguments(parser)
    return parser.format_help()
