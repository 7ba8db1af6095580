"""Peak memory and time of a rank for norms, products and projections beside FSDP's own step, with two processes.

python -m bench.sharded
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import fastgrad
from bench import clock
from bench.report import pages

WIDTH, DEPTH, BATCH, LENGTH, SIZE = 256, 8, 8, 64, 4096


def network() -> nn.Sequential:
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(DEPTH)]
    return nn.Sequential(nn.Embedding(512, WIDTH), *layers, nn.Linear(WIDTH, 512))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/file", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model, mesh = network(), init_device_mesh("cpu", (2,))
    for layer in model[1:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, y = torch.randint(512, (2, BATCH, LENGTH)).unbind()

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
        "grad_project": recorded(lambda each: fastgrad.grad_project(each, model, SIZE)),
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


def measure() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=2)
        for rank in (0, 1):
            yield from torch.load(Path(folder) / str(rank))


if __name__ == "__main__":
    pages.command(
        "sharded", __doc__, measure, packages=("torch",),
        facts={"parameters": sum(p.numel() for p in network().parameters()), "batch": BATCH, "length": LENGTH},
    )  # fmt: skip
