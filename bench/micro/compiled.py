"""All contrasts on a CPU: eager, and compiled by ``torch.compile`` from fastgrad's call, an exact and a textbook form.

    python -m bench.micro.compiled          # writes bench/results/compiled.json and its page

The forms of a case are timed in turns, so that a busy machine slows all of them down alike. A time is the least of the
turns, and its ratio the median of the turns' ratios to a softmax. The textbook form is timed although it is wrong for
confident samples, and shows its error.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from bench import clock
from bench.registry import Case
from bench.report import pages
from fastgrad.memory import keep_freed_memory

BASE = "torch.softmax"
FORMS = (BASE, "fastgrad eager", "torch.compile of fastgrad", "exact form, torch.compile", "closed form, torch.compile")
#: The float64 reference of the largest would take minutes.
SHAPES = list(itertools.product((10, 1000, 32000), (1, 256, 4096)))[:-1]


def rows(threads: int, N: int, B: int, turns: int = 9) -> list[dict[str, Any]]:
    """Return the rows of a case, measured in this process."""
    from bench.micro.contrasts import contrasts

    torch.set_num_threads(threads)
    keep_freed_memory()
    case = Case("compiled", "", BASE, FORMS, partial(contrasts, B, N, 512, "float32"))
    *made, textbook = (case.implementations("cpu")[form] for form in FORMS)
    calls = [case.ready(form.name, "cpu") for form in made] + [textbook.prepare()]
    errors = [form.check(call()) for form, call in zip((*made, textbook), calls, strict=True)]

    def seconds(call: Callable[[], Any], calls: int) -> float:
        with torch.no_grad():
            return clock.seconds(call, calls, clock.time.perf_counter)

    taken = clock.in_turns([partial(seconds, call) for call in calls], turns, least=5e-3)
    return [
        {"case": f"B={B} N={N}, {threads} thread{'s' * (threads > 1)}", "form": form, "us": min(times) * 1e6,
         **clock.rounded_ratio(times, taken[0]), "error": error}
        for form, times, error in zip(FORMS, taken, errors, strict=True)
    ]  # fmt: skip


def measure() -> Iterator[dict[str, Any]]:
    """Yield the rows of all cases; each number of threads has a process, as compiled code is made for it."""
    for threads in (1, 2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for N, B in SHAPES:
                yield from process.submit(rows, threads, N, B).result()


if __name__ == "__main__":
    pages.command("compiled", __doc__, measure, packages=("torch",))
