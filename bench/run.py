"""``fastgrad bench``: measure a selection and write its report.

    fastgrad bench quick --out bench-results
    fastgrad bench last-layer --out bench-results --only 'B=256 N=1000' --append
    fastgrad bench network --out bench-results --against HEAD~5

On a machine that others use, a long selection can be measured in slices: ``--only`` takes the cases whose name
contains a text (several, separated by ``|``) and ``--append`` adds them to the report already there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import isolated, revisions
from bench.harness.case import Result
from bench.harness.measure import run_case
from bench.report import document, page, standing
from bench.report.units import duration
from bench.selections import ISOLATED, SELECTIONS, cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("selection", nargs="?", metavar="SELECTION", help=", ".join(SELECTIONS))
    parser.add_argument("--list", action="store_true", help="name the selections and their cases, and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON, table and figures")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name contains one of TEXT|TEXT"
    )
    parser.add_argument("--append", action="store_true", help="keep the other cases of the report in DIR")
    parser.add_argument("--against", metavar="REV", help="also measure the package of another git revision")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of models and inputs")
    parser.add_argument(
        "--budget", type=float, default=4.0, metavar="S", help="seconds of timing a case (default 4)"
    )
    parser.add_argument(
        "--limit", type=float, metavar="S", help="start no further case after this many seconds"
    )
    parser.add_argument("--no-figures", action="store_true", help="write JSON and table only")
    parser.add_argument("--tiny", action="store_true", help="sizes that only walk through the code")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measure, write, print where; 1 if one of fastgrad's own implementations was not correct."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.list:
        for name, line in SELECTIONS.items():
            print(f"{name:12} {line}")
            if options.selection == name:
                for case in cases(name, device, options.seed, options.tiny):
                    print(f"    {case.name}")
        return 0
    if options.selection not in SELECTIONS:
        raise ValueError(f"SELECTION must be one of {', '.join(SELECTIONS)}; it was {options.selection!r}")
    if options.out is None and options.samples is None:
        raise ValueError("--out must name a folder; it was not given")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be 'cpu' on a machine without CUDA; it was 'cuda'")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1; it was {options.threads}")
    known = [case.name for case in cases(options.selection, device, options.seed, options.tiny)]
    if not any(text in name for text in options.only.split("|") for name in known):
        raise ValueError(f"--only must be part of a case's name, see --list; it was {options.only!r}")
    if options.against:
        results = revisions.compare(options.against, ["-m", "bench.run", *_words(options, device)])
    else:
        results = measure(options, device)
    if options.samples is not None:
        options.samples.write_text(json.dumps([dataclasses.asdict(r) for r in results]))
        return 0
    path, found = write(options, results, device, figures=not options.no_figures)
    print(standing.standing(found["cases"]))
    wrong = [r for r in results if standing.ours(r.implementation) and not r.correct]
    for result in wrong:
        print(f"wrong: {result.case}, {result.implementation}: {result.note}", file=sys.stderr)
    print(path)
    return 1 if wrong else 0


def write(
    options: argparse.Namespace, results: list[Result], device: str, *, figures: bool
) -> tuple[Path, dict[str, Any]]:
    """Write the report of what was measured so far; returns its path and content."""
    whole = document.document(results, options.seed, device)
    path = options.out / f"{options.selection}.json"
    if options.append and path.exists():
        whole = document.merge(json.loads(path.read_text()), whole)
    notes = [f"{r.case}, {r.implementation}: {r.note}" for r in results if r.note]
    return page.write(options.out, options.selection, whole, notes, figures), whole


def measure(options: argparse.Namespace, device: str) -> list[Result]:
    """Run the chosen cases; progress goes to standard error."""
    torch.set_num_threads(options.threads)
    texts = options.only.split("|")
    every = partial(cases, options.selection, device, options.seed, options.tiny)
    source = isolated.Source(every, options.threads)
    found: list[Result] = []
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Peers warn of hooks and missing batching rules; whether their numbers are right is checked.
        warnings.simplefilter("ignore")
        for case in every():
            if not case.name.startswith("floor:") and not any(text in case.name for text in texts):
                continue
            if options.limit is not None and time.perf_counter() - start > options.limit:
                print(f"not measured for lack of time: {case.name}", file=sys.stderr, flush=True)
                continue
            if device == "cpu" and options.selection in ISOLATED:
                results = isolated.run_case(case, source, options.budget)
            else:
                results = run_case(case, device, options.budget)
            found += results
            line = ", ".join(f"{r.implementation} {duration(r.quantile(0.5))}" for r in results)
            print(f"[{time.perf_counter() - start:4.0f} s] {case.name}: {line}", file=sys.stderr, flush=True)
            if options.append and options.out is not None:
                # A slice that is stopped keeps the cases it finished.
                write(options, found, device, figures=False)
    return found


def _words(options: argparse.Namespace, device: str) -> list[str]:
    words = [options.selection, "--device", device, "--only", options.only]
    words += ["--threads", str(options.threads), "--seed", str(options.seed), "--budget", str(options.budget)]
    return [*words, "--tiny"] if options.tiny else words


def main(arguments: list[str] | None = None) -> int:
    """``python -m bench.run``, the same command without the package's command line."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").split("\n", 1)[0])
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
