"""Every file of results: machine, versions and revision at its head; its JSON, and the options of what writes it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, networks: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a command line that says where the results go and, where there are several, of which networks."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    if networks:
        found.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks))
    found.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: bench/results)")
    return found


def machine() -> str:
    """Return processor, cores, memory and system."""
    listed = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", listed.read_text() if listed.exists() else "", re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def origin(packages: Sequence[str], *device: str) -> dict[str, Any]:
    """Return machine and device, versions of what is installed, and the commit, with a plus sign if files differ."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    # Commits by their number alone, whatever tags there are.
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    revision = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    return {"machine": ", ".join([machine(), *device]), "versions": versions, "revision": revision}


def printed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows, each printed as soon as it is there."""
    found = []
    for row in rows:
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    return found


def store(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as JSON, a line for each of its ``rows`` or, of speed, its ``cases``."""
    key = "cases" if "cases" in document else "rows"
    rows = ",\n  ".join(json.dumps(row) for row in document[key])
    head = json.dumps({name: value for name, value in document.items() if name != key}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "{key}": [\n  {rows}\n ]\n}}\n')
    print(f"wrote {path}", file=sys.stderr)
