"""The command line: ``fastgrad COMMAND``; each command is a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

import fastgrad

# Command: module with add_arguments(parser) and run(arguments), the extra it needs, one line of help.
COMMANDS = {
    "demo": (
        "fastgrad.commands.demo.run",
        None,
        "train on real digits, detect what the network does not know, draw it",
    ),
    "doctor": (
        "fastgrad.commands.doctor",
        None,
        "print versions, devices and which implementation would run, and why",
    ),
    "bench": ("fastgrad.commands.bench", "bench", "measure against the alternatives (from a checkout)"),
    "serve": ("fastgrad.commands.serve", "serve", "serve an exported file over HTTP"),
    "score": ("fastgrad.commands.score", "score", "score a folder or a Parquet file of images"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 for unusable arguments."""
    parser = argparse.ArgumentParser(prog="fastgrad", description=fastgrad.__doc__)
    parser.add_argument("--version", action="version", version=f"fastgrad {fastgrad.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = sys.argv[1:] if arguments is None else arguments
    for name, (module, _, line) in COMMANDS.items():
        command = subparsers.add_parser(name, help=line, description=line)
        # Only the chosen command is imported: the others may need extras that are not installed.
        if words[:1] == [name]:
            try:
                importlib.import_module(module).add_arguments(command)
            except ModuleNotFoundError as error:
                return _missing(name, error)
    parsed = parser.parse_args(words)
    try:
        return int(importlib.import_module(COMMANDS[parsed.command][0]).run(parsed))
    except ModuleNotFoundError as error:
        return _missing(parsed.command, error)
    except (ValueError, TypeError, OSError) as error:
        print(f"fastgrad {parsed.command}: {error}", file=sys.stderr)
        return 2


def _missing(command: str, error: ModuleNotFoundError) -> int:
    extra = COMMANDS[command][1]
    if extra is None or (error.name or "").startswith("fastgrad"):
        raise error
    print(
        f"fastgrad {command}: {error.name} is not installed; it comes with: pip install 'fastgrad[{extra}]'",
        file=sys.stderr,
    )
    return 2
