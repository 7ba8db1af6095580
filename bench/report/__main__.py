"""Make pages, figures and the blocks of README and documentation anew from ``bench/results``.

python -m bench.report                  # everything
python -m bench.report --check          # change nothing; exit status 1 and a list if a block or page is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import blocks, pages
from bench.report.pages import RESULTS

ROOT = Path(__file__).parents[2]
PAGES = ("results", "explanation/kernels", "explanation/what-it-finds", "should-i-use-it")
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in PAGES),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]


def stale(folder: Path = RESULTS, documents: Sequence[Path] = DOCUMENTS) -> list[str]:
    """Return the names of pages and blocks of documents that differ from the results."""
    found = []
    for path in sorted(folder.glob("*.json")):
        pictures = [picture.name for picture in folder.glob(f"{path.stem}.png")]
        rendered = pages.page(path.stem, json.loads(path.read_text()), pictures)
        target = path.with_suffix(".md")
        if rendered is not None and (not target.exists() or target.read_text() != rendered):
            found.append(target.name)
    for file in documents:
        found += [f"{file.name}: {name}" for name in blocks.differing(file.read_text(), folder)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a block or page is stale")
    if parser.parse_args().check:
        found = stale()
        print("\n".join(f"stale: {name}" for name in found))
        return 1 if found else 0
    for path in sorted(RESULTS.glob("*.json")):
        pages.write(path.stem)
    for file in DOCUMENTS:
        file.write_text(blocks.fill(file.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
