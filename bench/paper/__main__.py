"""``python -m bench.paper TABLE``: one of the tables in ``bench/paper/tables``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

from bench.paper import tables
from bench.paper.table import Table, add_arguments, options_of


def main(arguments: list[str] | None = None) -> int:
    """Make the table; 2 and a plain message where the folder or the cache is not what it must be."""
    names = sorted(module.name for module in pkgutil.iter_modules(tables.__path__))
    parser = argparse.ArgumentParser(prog="bench.paper", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", choices=names, help=", ".join(names), metavar="TABLE")
    add_arguments(parser)
    given = parser.parse_args(arguments)
    table: Table = importlib.import_module(f"bench.paper.tables.{given.table}").TABLE
    try:
        table.run(options_of(given))
    except (ValueError, FileNotFoundError) as error:
        print(f"bench.paper: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
