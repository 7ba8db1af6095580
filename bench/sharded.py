"""Peak memory and time of a rank for norms, products and projections beside FSDP's own step, with two processes.

python -m bench.sharded
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import fastgrad
from bench import clock
from bench.report import pages


class Sizes(NamedTuple):
    """Of the encoder, of a rank's batch, and of its projected rows."""

    width: int = 256
    depth: int = 8
    batch: int = 8
    length: int = 64
    numbers: int = 4096


FULL = Sizes()


def network(sizes: Sizes) -> nn.Sequential:
    width = sizes.width
    layers = [
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(sizes.depth)
    ]
    return nn.Sequential(nn.Embedding(512, width), *layers, nn.Linear(width, 512))


def _rank(rank: int, folder: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/file", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model, mesh = network(sizes), init_device_mesh("cpu", (2,))
    for layer in model[1:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, y = torch.randint(512, (2, sizes.batch, sizes.length)).unbind()

    def losses() -> Tensor:
        return cross_entropy(model(x).mT, y, reduction="none").mean(1)

    def step() -> None:
        model.zero_grad()
        losses().sum().backward()

    def recorded(function: Callable[[Tensor], Any]) -> Callable[[], None]:
        def call() -> None:
            with fastgrad.record(model):
                function(losses())

        return call

    calls = {
        "step of FSDP": step,
        "grad_sqnorm": recorded(lambda each: fastgrad.grad_sqnorm(each, model)),
        "grad_gram": recorded(lambda each: fastgrad.grad_gram(each, model)),
        "grad_project": recorded(lambda each: fastgrad.grad_project(each, model, sizes.numbers)),
    }
    found = []
    for name, call in calls.items():
        call()
        model.zero_grad()
        seconds = min(clock.seconds(call, 1) for _ in range(3))
        model.zero_grad()
        found.append({"call": name, "rank": rank, "seconds": seconds, "peak_bytes": clock.peak_bytes(call, "cpu")})
    torch.save(found, f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def measure(sizes: Sizes = FULL) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, sizes), nprocs=2)
        for rank in (0, 1):
            yield from torch.load(Path(folder) / str(rank))


if __name__ == "__main__":
    pages.command(
        "sharded", __doc__, measure, packages=("torch",),
        facts={"parameters": sum(p.numel() for p in network(FULL).parameters()), "batch": FULL.batch,
               "length": FULL.length},
    )  # fmt: skip
