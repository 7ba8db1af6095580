"""Norms of every parameter on a GPT whose blocks are checkpointed, beside a training step and a loop over samples.

python -m bench.checkpoints
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastgrad
from bench import clock
from bench.micro.models import GPT
from bench.registry import SEED
from bench.report import pages

BATCH, LENGTH, VOCABULARY, WIDTH, DEPTH, REPEATS = 16, 128, 512, 256, 6, 3
#: What a selective checkpoint keeps.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
#: Arguments of each block's checkpoint; None runs it as it is.
BLOCKS: dict[str, dict[str, Any] | None] = {
    "as they are": None,
    "checkpointed": {},
    "checkpointed, products kept": {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)},
}


class Checkpointed(nn.Module):
    """A block in a checkpoint of its own."""

    def __init__(self, block: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False, **self.options)
        return out


def calls(
    options: dict[str, Any] | None, batch: int, length: int, width: int, depth: int
) -> dict[str, Callable[[], Any]]:
    """Return what is compared, each on the same network and tokens: all but the step return norms ``(B, P)``."""
    torch.manual_seed(SEED)
    model = GPT(VOCABULARY, length, width, depth, 4)
    if options is not None:
        model.layers = nn.Sequential(*(Checkpointed(block, options) for block in model.layers))
    x, y = torch.randint(VOCABULARY, (batch, length)), torch.randint(10, (batch,))
    parameters = list(model.parameters())

    def losses(rows: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(model(rows), classes, reduction="none")

    def step() -> None:
        torch.autograd.grad(losses(x, y).sum(), parameters)

    def norms() -> Tensor:
        with fastgrad.record(model):
            return torch.stack(fastgrad.grad_sqnorm(losses(x, y), model), 1)

    def loop() -> Tensor:
        rows = [torch.autograd.grad(losses(*one).sum(), parameters) for one in zip(x.split(1), y.split(1), strict=True)]
        return torch.stack([torch.stack([g.square().sum() for g in row]) for row in rows])

    return {"training step": step, "fastgrad": norms, "loop over samples": loop}


def measure() -> Iterator[dict[str, Any]]:
    """Yield least processor times of calls in turns and peak bytes, after the norms agree with the loop's."""
    torch.set_num_threads(1)
    for blocks, options in BLOCKS.items():
        compared = calls(options, BATCH, LENGTH, WIDTH, DEPTH)
        # Both are sums of float32 products in another order, over as many terms as a sample has tokens.
        torch.testing.assert_close(compared["fastgrad"](), compared["loop over samples"](), rtol=1e-3, atol=1e-9)
        taken = clock.in_turns([lambda n, call=call: clock.seconds(call, n) for call in compared.values()], REPEATS)
        for (name, call), times in zip(compared.items(), taken, strict=True):
            yield {"blocks": blocks, "call": name, "seconds": min(times), "peak_bytes": clock.peak_bytes(call, "cpu")}


if __name__ == "__main__":
    facts = {"batch": BATCH, "length": LENGTH, "width": WIDTH, "depth": DEPTH}
    pages.command("checkpoints", __doc__, measure, packages=("torch",), facts=facts)
