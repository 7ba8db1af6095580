"""The command line, ``fastgrad COMMAND``; each command is a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys

import fastgrad
from fastgrad.checks import MissingExtraError, extra

# Command: module with add_arguments(parser) and run(arguments), the extra it needs, a line of help.
COMMANDS = {
    "demo": ("fastgrad.commands.demo", "demo", "train on real digits, detect unusual images, draw a figure"),
    "doctor": (
        "fastgrad.commands.doctor",
        None,
        "print versions, devices, and which implementations would run and why",
    ),
    "fit": ("fastgrad.commands.fit", "serve", "fit a detector on a folder of clean images; write a file for serve"),
    "serve": ("fastgrad.commands.serve", "serve", "serve an exported file over HTTP"),
    "score": ("fastgrad.commands.score", "score", "score a folder or a Parquet file of images"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status, 2 for unusable arguments or a missing extra."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names that it cannot encode are escaped, as on standard error; otherwise the work would end in an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="fastgrad", description="Try fastgrad; fit a detector; serve or score an exported model."
    )
    parser.add_argument("--version", action="version", version=f"fastgrad {fastgrad.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (_, _, line) in COMMANDS.items():
        parsers[name] = subparsers.add_parser(name, help=line, description=line)
    words = sys.argv[1:] if arguments is None else arguments
    name = parser.parse_args(words[:1]).command
    module, needed, _ = COMMANDS[name]
    try:
        with extra(needed) if needed else contextlib.nullcontext():
            # Only the chosen command is imported, because others may need extras that are not installed.
            command = importlib.import_module(module)
            command.add_arguments(parsers[name])
            return int(command.run(parser.parse_args(words)))
    except (MissingExtraError, ValueError, TypeError, OSError) as error:
        print(f"fastgrad {name}: {error}", file=sys.stderr)
        return 2
