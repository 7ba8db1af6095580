"""A network that ``fully_shard`` shards over two processes, the whole one, and plain gradients of its samples."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

ROUNDING = 1e3 * torch.finfo(torch.float64).eps


class Block(nn.Sequential):
    """Layers, in a checkpoint or plain."""

    def __init__(self, *layers: nn.Module, again: bool) -> None:
        super().__init__(*layers)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        plain: Any = super().forward
        out: Tensor = checkpoint(plain, x, use_reentrant=False) if self.again else plain(x)
        return out


class Net(nn.Module):
    """A network of residual blocks on tokens; ``checkpoints`` are "around" blocks, or "inside" of them."""

    def __init__(self, *, tied: bool = False, checkpoints: str = "") -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            Block(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), again=checkpoints == "inside")
            for _ in range(3)
        )
        self.around = checkpoints == "around"
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.skipped, self.fails, self.reads = 3, False, False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks[: self.skipped]:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.around else block(x))
        if self.fails:
            raise RuntimeError("of the model")
        logits: Tensor = self.head(x if not self.reads or tokens[0, 0] > 0 else 2 * x)
        return logits


def pair(dtype: torch.dtype = torch.float64, *, root: bool = True, nested: bool = True, tied: bool = False,
         frozen: str = "-", checkpoints: str = "", **options: Any) -> tuple[Net, Net]:  # fmt: skip
    """Return a sharded network and a whole one that is equal."""
    torch.manual_seed(0)
    sharded, whole = (Net(tied=tied, checkpoints=checkpoints).to(dtype) for _ in range(2))
    whole.load_state_dict(sharded.state_dict())
    for net in (sharded, whole):
        for name, p in net.named_parameters():
            p.requires_grad_(frozen not in name)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks if nested else ():
        fully_shard(block, mesh=mesh, **options)
    if root:
        fully_shard(sharded, mesh=mesh, **options)
    return sharded, whole


def batch(rank: int, seed: int = 0, samples: tuple[int, int] = (4, 3)) -> tuple[Tensor, Tensor]:
    """Return the tokens and targets of a rank."""
    torch.manual_seed(10 * seed + rank)
    return torch.randint(11, (samples[rank], 5)), torch.randint(11, (samples[rank], 5))


def losses_of(net: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(net(tokens).mT.double(), targets, reduction="none").mean(1)


def step(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """A plain step, in which FSDP itself warns of a linear layer's view."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses_of(net, *data).sum().backward()


def gradients(whole: Net, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return each sample's gradients by plain autograd, ``(B, *shape)`` for each parameter; zeros where frozen."""
    wanted = list(whole.parameters())
    frozen = [not p.requires_grad for p in wanted]
    whole.requires_grad_(True)
    rows = []
    for x, y in zip(*data, strict=True):
        own = torch.autograd.grad(losses_of(whole, x[None], y[None]).sum(), wanted, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(own, wanted, strict=True)])
    for p, still in zip(wanted, frozen, strict=True):
        p.requires_grad_(not still)
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def close(found: Tensor, expected: Tensor, rounding: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= rounding * expected.abs().max() + 1e-30
