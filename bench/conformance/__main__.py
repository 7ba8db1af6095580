"""Unmodified models of public packages under every tool, each beside a float64 loop over the samples.

    python -m bench.conformance                 # the peers must be installed
    python -m bench.conformance --only gpt2     # models whose name contains it

Each cell, a model under a tool, is a process of its own with limits of processor time and memory, so that a crash costs
one cell.
"""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench import clock
from bench.conformance.models import MODELS
from bench.conformance.task import Loop, Task
from bench.conformance.tools import TOOLS
from bench.report import pages

BATCH, SECONDS, BYTES, REPEATS = 4, 30, 14 << 30, 3
#: Seconds after which a process that waits for something is ended.
WAITED = 20 * SECONDS
PACKAGES = (
    "timm", "torchvision", "transformers", "opacus.grad_sample", "backpack", "dattri_llm",
    "bergson.collector.gradient_collectors",
)  # fmt: skip


def allowed(dtype: torch.dtype) -> float:
    """Return half of the dtype's digits: what is wrong is off by far more, and roundings are by far less."""
    return float(torch.finfo(dtype).eps ** 0.5)


def cell(name: str, tool: str) -> dict[str, Any]:
    """Return the errors of a tool in float64, or in float32 if it refuses that, and time and memory in float32."""
    task = Task(name, BATCH)
    loop = Loop(task)
    for dtype in (torch.float64, torch.float32):
        try:
            calls = TOOLS[tool](task.to(dtype))
            found = calls.norms()
        except Exception:
            if dtype == torch.float32:
                raise
        else:
            break
    covered = calls.covered()
    used = loop.used
    numbers = {key: loop.gradients[key].shape[1] for key in used}
    row: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "covered": sum(numbers[key] for key in covered & used) / sum(numbers.values()),
    }
    by_all = list(found) == [""]
    row["norms"] = loop.total_error(found[""], covered) if by_all else loop.norm_error(found)
    row["products"] = loop.gram_error(calls.gram(), covered)
    if calls.rows is not None:
        row["projections"] = loop.projection_error(calls.rows())
    row["verdict"] = (
        "wrong" if max(row["norms"], row["products"], row.get("projections", 0)) > allowed(dtype) else "exact"
    )
    if row["verdict"] == "exact" and row["covered"] < 1:
        row["verdict"] = "part"
    del loop
    single = task.to(torch.float32)
    norms = TOOLS[tool](single).norms
    parameters = list(single.model.parameters())

    def step() -> Any:
        return torch.autograd.grad(single.losses().sum(), parameters, allow_unused=True)

    own, base = _timed(norms), _timed(step)
    row |= {"seconds": own, "steps": own / base}
    row |= {"peak_bytes": clock.peak_bytes(norms, "cpu"), "step_bytes": clock.peak_bytes(step, "cpu")}
    return row


def _timed(call: Callable[[], Any]) -> float:
    """Return the least processor time of a call, after a first."""
    call()
    return min(clock.seconds(call, 1) for _ in range(REPEATS))


def _child(pipe: Connection, name: str, tool: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    warnings.simplefilter("ignore")
    try:
        pipe.send(cell(name, tool))
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        pipe.send({"verdict": "refused", "note": f"{type(problem).__name__}: {lines[0]}"[:160]})


def alone(name: str, tool: str) -> dict[str, Any]:
    """Return the row of a cell, from a process of its own."""
    context = multiprocessing.get_context("fork")  # packages are imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, name, tool))
    process.start()
    theirs.close()
    waited = ours.poll(WAITED)
    if not waited:
        process.kill()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        late = not waited or process.exitcode == -signal.SIGXCPU
        found = {"verdict": "refused", "note": f"no result within {SECONDS} s" if late else "the process died"}
    process.join()
    return {"model": name, "tool": tool, **found}


def measure(only: str = "", limit: float = float("inf")) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for package in PACKAGES:  # before processes are forked
        importlib.import_module(package)
    begin = time.monotonic()
    for name in MODELS:
        if only in name and time.monotonic() - begin < limit:
            yield from (alone(name, tool) for tool in TOOLS)


if __name__ == "__main__":
    pages.command(
        "conformance", __doc__, measure,
        packages=(
            "torch", "timm", "torchvision", "transformers", "opacus", "backpack-for-pytorch", "dattri-llm", "bergson"
        ),
        keys=("model", "tool"), facts={"batch": BATCH, "limit_s": SECONDS, "allowed": allowed(torch.float64)},
        only={"default": "", "metavar": "TEXT", "help": "models whose names contain it"},
        limit={"type": float, "default": float("inf"), "help": "seconds after which no further model begins"},
    )  # fmt: skip
