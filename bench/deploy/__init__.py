"""What is deployed: exported files, the server, scoring of folders, drift."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def parser(doc: str | None, networks: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a command line that says where the results go and, where there are several, of which networks."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    if networks:
        found.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks))
    found.add_argument("--out", type=Path, help="folder for the results (default: bench/results)")
    return found
