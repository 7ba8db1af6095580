"""Private training with two processes: each step is that of one process that holds all samples and draws the noise."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import torch
from sharded_nets import close
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastgrad

optimizers = pytest.importorskip("opacus.optimizers")

STEPS, BATCH, MAX_NORM, NOISE, RATE = 3, 8, 0.5, 0.7, 0.3
DRAWN = ((5, 3), (0, 6), (4, 4))  # a rank may draw no sample


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def samples(step: int, rank: int) -> tuple[Tensor, Tensor]:
    made, count = torch.Generator().manual_seed(10 * step + rank), DRAWN[step][rank]
    return torch.randn(count, 6, generator=made).double(), torch.randint(4, (count,), generator=made)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/file", rank=rank, world_size=2, timeout=dt.timedelta(seconds=30)
    )
    model = DistributedDataParallel(network())
    optimizer = optimizers.DistributedDPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=RATE), noise_multiplier=NOISE, max_grad_norm=MAX_NORM,
        expected_batch_size=BATCH // 2, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    for step in range(STEPS):
        x, y = samples(step, rank)
        optimizer.zero_grad()
        with fastgrad.clip_gradients(model, MAX_NORM) as clipped:
            clipped.backward(cross_entropy(model(x), y, reduction="none"))
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def reference() -> list[Tensor]:
    """Clip each sample by plain autograd, and add the noise of the first rank's generator."""
    model, made = network(), torch.Generator().manual_seed(5)
    parameters = list(model.parameters())
    for step in range(STEPS):
        total = [torch.zeros_like(p) for p in parameters]
        for x, y in (pair for rank in (0, 1) for pair in zip(*samples(step, rank), strict=True)):
            own = torch.autograd.grad(cross_entropy(model(x[None]), y[None]), parameters)
            norm = torch.stack([g.square().sum() for g in own]).sum().sqrt()
            for t, g in zip(total, own, strict=True):
                t += (MAX_NORM / norm).clamp(max=1) * g
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= RATE * (t + torch.normal(0, NOISE * MAX_NORM, p.shape, generator=made, dtype=p.dtype)) / BATCH
    return [p.detach() for p in parameters]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for one, other, expected in zip(*found, reference(), strict=True):
        assert torch.equal(one, other)
        close(one, expected)
