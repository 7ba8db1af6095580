"""Models that users of other packages reported: fastgrad's norms of each are those of autograd, or it is refused.

``docs/results/speed.md`` lists the reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, check_losses, recorded
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 4, 2, -100, -100])


def squares(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def cubes(out: Tensor) -> Tensor:
    """For outputs of layer norm, whose sum of squares is constant: its gradients are rounding errors."""
    return out.pow(3).flatten(1).sum(1)


def counted(out: Tensor) -> Tensor:
    """The mean over tokens that count."""
    each = F.cross_entropy(out.mT, LABELS.expand(len(out), -1), ignore_index=-100, reduction="none")
    return each.sum(1) / (LABELS != -100).sum()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9))
    model[2].weight = model[0].weight
    return model


def embedded(function: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    """``function`` of embedded tokens."""
    return Net(lambda net, x: function(net, net.embed(x)), embed=nn.Embedding(9, 6), **parts)


def attention(net: Any, h: Tensor) -> Tensor:
    """A parameter of its own; queries and keys are one projection."""
    k, distance = net.key(h), (torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])).abs()
    return (k @ k.mT - distance * F.softplus(net.decay)).softmax(-1) @ net.value(h)


NORM, DECAY = nn.LayerNorm(6), nn.Parameter(torch.rand(1))
#: By the reports: models of tokens or images, and the losses ``(B,)`` of their output.
REPORTED: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "Opacus #413, PyTorch #80951: tied weights": (tied, TOKENS, squares),
    "Opacus #578: one layer norm in two places": (
        lambda: nn.Sequential(nn.Embedding(9, 6), NORM, nn.Linear(6, 6), NORM), TOKENS, cubes),
    "BackPACK #263, #327: layer norm": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)), TOKENS, squares),
    **{f"BackPACK #270, Opacus #639: {kind.__name__} in a module": (
        lambda kind=kind: embedded(lambda net, h: net.head(net.cell(h)[0]), cell=kind(6, 5, 2, batch_first=True),
                                   head=nn.Linear(5, 3)), TOKENS, squares) for kind in (nn.LSTM, nn.GRU)},
    "Opacus #639: attention": (
        lambda: embedded(attention, key=nn.Linear(6, 6), value=nn.Linear(6, 6), decay=DECAY), TOKENS, squares),
    "Opacus #841: positions": (  # looked up with a batch of one, which broadcasts
        lambda: embedded(lambda net, h: net.head(h + net.positions(torch.arange(h.shape[1])[None])),
                         positions=nn.Embedding(5, 6), head=nn.Linear(6, 9)), TOKENS, squares),
    "PyTorch #122729: checkpoint": (
        lambda: embedded(lambda net, h: checkpoint(net.layer, h, use_reentrant=False),
                         layer=nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)), TOKENS, cubes),
    "Opacus #792: ignored tokens": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)), TOKENS, counted),
    "Opacus #732: adapters beside a frozen layer, and a layer without use": (
        lambda: embedded(lambda net, h: net.base(h) + net.up(net.down(h)), base=nn.Linear(6, 6).requires_grad_(False),
                         unused=nn.Linear(6, 6), down=nn.Linear(6, 2), up=nn.Linear(2, 6)), TOKENS, squares),
    "Opacus #646: spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.Flatten(), nn.Linear(64, 3)).eval(), IMAGES,
        squares),
    "Opacus #673: batch norm in evaluation mode": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval(), IMAGES, squares),
}  # fmt: skip


@pytest.mark.parametrize("report", REPORTED)
def test_reported_models(report: str) -> None:
    torch.manual_seed(0)
    make, x, losses = REPORTED[report]
    model = make().double()
    check_losses(model, lambda x: losses(model(x)), x)


def test_batch_norm_in_training_mode_is_refused() -> None:
    """BackPACK #239."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"its batch norm '1' is in training mode.*call model.eval\(\)"):
        recorded(model, lambda: model(torch.rand(4, 3)).sum())
