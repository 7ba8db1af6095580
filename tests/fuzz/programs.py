"""Random programs, small modules and sequences of calls, held against float64 loops: one integer is one program.

``python tests/fuzz/programs.py --programs 10000 --processes 2 --save`` counts right, refused (by reason) and wrong
calls, and prints each wrong program, shrunk.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2]))

from tests.fuzz.generate import Program, Step, draw, source
from tests.fuzz.loop import InvalidError, RefusedError, WrongError

IMPORTS = """import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.scripts import scripted
from tests.fuzz.session import Session


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


"""


def standalone(program: Program, verdict: str) -> str:
    """The program as a file to run from the repository."""
    return f"# {verdict}\n{IMPORTS}{source(program)}"


def verdicts(program: Program) -> Iterator[str]:
    """What each call gives: ``right``, ``invalid``, ``refused: reason`` or ``wrong: what``; ends at what is wrong."""
    text = source(program)
    head, _, calls = text.partition("session = ")
    names: dict[str, Any] = {}
    first, *rest = calls.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(f"{IMPORTS}{head}session = {first}", f"program {program.seed}", "exec"), names)
        for line in rest:
            checked = any(f".{api}(" in line for api in ("record", "features", "clip", "submodule", "threads"))
            try:
                exec(line, names)
            except InvalidError:
                yield "invalid"
            except WrongError as error:
                yield f"wrong: {error}"
                return
            except RefusedError as error:
                yield f"refused: {reason(error.__cause__)}"
            else:
                if checked:
                    yield "right"


def reason(error: BaseException | None) -> str:
    """An error's message without the names and numbers of one program."""
    text = re.sub(r"'[^']*'", "'...'", str(error).split("\n")[0])
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', 'n', text)}"


def shrunk(program: Program, verdict: str) -> Program:
    """A smaller program that goes wrong in the same way."""
    kind = _kind(verdict)

    def still(candidate: Program) -> bool:
        try:
            return any(v.startswith("wrong") and _kind(v) == kind for v in verdicts(candidate))
        except Exception:
            return False

    going = True
    while going:
        going = False
        for candidate in smaller(program):
            if still(candidate):
                program, going = candidate, True
                break
    return program


def _kind(verdict: str) -> str:
    return re.sub(r"[0-9.e+-]+|nan|inf", "", verdict)[:40]


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for i in reversed(range(len(program.calls))):
        yield replace(program, calls=program.calls[:i] + program.calls[i + 1 :])
    for inside in fewer(program.steps):
        yield replace(program, steps=inside)
    plain = {"ties": (), "input": "features", "head": "none", "output": "logits", "options": "loss='bce'"}
    for name, value in plain.items():
        if getattr(program, name) != value:
            yield replace(program, **{name: value})
    simpler = [(r"batched=True", "batched=False"), (r"big=True", "big=False"), (r"mask=True", "mask=False")]
    simpler += [(r"depth=[023]", "depth=1"), (r"mode='b'", "mode='a'")]
    simpler += [(f"{size}={n}", f"{size}={m}") for size in "BT" for n in range(2, 7) for m in range(1, n)]
    for i, line in enumerate(program.calls):
        for old, new in simpler:
            if re.search(old, line):
                yield replace(program, calls=(*program.calls[:i], re.sub(old, new, line), *program.calls[i + 1 :]))


def fewer(inside: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Steps with one of them gone, replaced by what is inside it, or itself smaller."""
    for i, step in enumerate(inside):
        before, after = inside[:i], inside[i + 1 :]
        yield before + after
        if step.inside:
            yield before + step.inside + after
            for less in fewer(step.inside):
                if less:
                    yield (*before, replace(step, inside=less), *after)


def brief(inside: tuple[Step, ...]) -> str:
    """Steps by their kinds."""
    return "; ".join(s.kind + (f" ({brief(s.inside)})" if s.inside else "") for s in inside)


def tally(seeds: range) -> tuple[Counter[str], list[tuple[int, str]]]:
    """How often each verdict was given, and the wrong programs with theirs."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    wrong = []
    for seed in seeds:
        for verdict in verdicts(draw(seed)):
            counts[verdict if verdict.startswith("refused") else verdict.partition(":")[0]] += 1
            if verdict.startswith("wrong"):
                wrong.append((seed, verdict))
    return counts, wrong


def save(counts: Counter[str], seeds: range) -> None:
    """Write `bench/results/programs.json` and the page of it."""
    from bench.report.pages import save

    rows = [{"verdict": verdict, "calls": count} for verdict, count in counts.most_common()]
    save("programs", rows, packages=("torch",), facts={"programs": len(seeds), "seed": seeds.start})


def main() -> None:
    """Run programs, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the programs that went wrong")
    parser.add_argument("--show", type=int, default=5, help="wrong programs of one kind that are shrunk")
    parser.add_argument("--save", action="store_true", help="write bench/results/programs.json and programs.md")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.programs)
    parts = [seeds[i : i + 100] for i in range(0, len(seeds), 100)]
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for done, wrong in pool.map(tally, parts):
            counts += done
            for seed, verdict in wrong:
                kind = _kind(verdict)
                seen[kind] += 1
                print(seed, verdict, flush=True)
                if seen[kind] > options.show:
                    continue
                small = shrunk(draw(seed), verdict)
                print(f"    {brief(small.steps)}", small.calls, flush=True)
                if options.out is not None:
                    (options.out / f"program_{seed}.py").write_text(standalone(small, verdict))
    counts["wrong"] += 0
    for verdict, count in counts.most_common():
        print(f"{count:7d}  {verdict}")
    if options.save:
        save(counts, seeds)
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
