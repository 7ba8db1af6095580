"""A GPT whose blocks are compiled beside the same GPT as it is written, with and without a recorder.

python -m bench.compiled_blocks

Both are in one process and take turns, so that a slow minute of the machine hits both. No call that is timed compiles
anything: a further one is made in PyTorch's stance that raises if code would be compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad
from bench import clock
from bench.micro.models import GPT
from bench.registry import SEED, scaled_error
from bench.report import pages

#: Vocabulary, length, width, depth and heads; samples; rounds of turns.
SIZES, BATCH, ROUNDS = (2048, 64, 256, 3, 4), 16, 15
Call = Callable[[nn.Module, Tensor], Tensor]


def _losses(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x), torch.arange(len(x)) % 10, reduction="none")


def step(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(_losses(model, x).sum(), list(model.parameters()))[-1]


def norms(model: nn.Module, x: Tensor) -> Tensor:
    with fastgrad.record(model):
        return torch.stack(fastgrad.grad_sqnorm(_losses(model, x), list(model.parameters())))


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


@torch.no_grad()
def recorded(model: nn.Module, x: Tensor) -> Tensor:
    with fastgrad.record(model):
        found: Tensor = model(x)
    return found


#: Calls of one model, each with the call by which its time is divided.
CALLS: Mapping[str, tuple[Call, str]] = {
    "training step": (step, "training step"),
    "grad_sqnorm under record": (norms, "training step"),
    "forward, no_grad": (forward, "forward, no_grad"),
    "forward under record, no_grad": (recorded, "forward, no_grad"),
}


def measure(
    backend: str = "inductor", sizes: tuple[int, int, int, int, int] = SIZES, rounds: int = ROUNDS
) -> Iterator[dict[str, Any]]:
    """Yield the least processor time of each call by either model, and the ratio of these times, turn by turn."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    written = GPT(*sizes).eval()
    compiled = copy.deepcopy(written)
    for block in compiled.layers:
        block.compile(backend=backend)
    x = torch.randint(sizes[0], (BATCH, sizes[1]))
    calls = {
        (name, which): partial(call, model, x)
        for name, (call, _) in CALLS.items()
        for which, model in (("as written", written), ("compiled", compiled))
    }
    error = {
        name: scaled_error(calls[name, "compiled"](), calls[name, "as written"]().detach().double()) for name in CALLS
    }
    taken = clock.in_turns([lambda n, call=call: clock.seconds(call, n) for call in calls.values()], rounds)
    times = dict(zip(calls, taken, strict=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in calls.values():
            call()
    for name, (_, base) in CALLS.items():
        both = {which: min(times[name, which]) for which in ("as written", "compiled")}
        yield {
            "call": name, **both, **clock.rounded_ratio(times[name, "compiled"], times[name, "as written"]),
            "over": {which: both[which] / min(times[base, which]) for which in both}, "base": base,
            "error": error[name],
        }  # fmt: skip


if __name__ == "__main__":
    pages.command(
        "compiled-blocks", __doc__, measure, packages=("torch",),
        facts={"parameters": sum(p.numel() for p in GPT(*SIZES).parameters()), "batch": BATCH, "length": SIZES[1],
               "depth": SIZES[3]},
    )  # fmt: skip
