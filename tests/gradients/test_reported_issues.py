"""Models that users of other packages reported: fastgrad's norms of each are those of autograd, or it is refused.

``docs/results/speed.md`` lists the reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, check_losses
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fastgrad

TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 4, 2, -100, -100])


def squares(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def counted(out: Tensor) -> Tensor:
    """The mean over tokens that count."""
    each = F.cross_entropy(out.mT, LABELS.expand(len(out), -1), ignore_index=-100, reduction="none")
    return each.sum(1) / (LABELS != -100).sum()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9))
    model[2].weight = model[0].weight
    return model


def decoder(kind: type[nn.RNNBase]) -> nn.Module:
    cell = kind(6, 5, 2, batch_first=True)
    return Net(lambda net, x: net.head(net.cell(net.embed(x))[0]), embed=nn.Embedding(9, 6), cell=cell,
               head=nn.Linear(5, 3))  # fmt: skip


def attention(net: Any, x: Tensor) -> Tensor:
    """A parameter of its own; queries and keys are one projection."""
    h, distance = net.embed(x), (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
    k = net.key(h)
    return (k @ k.mT - distance * F.softplus(net.decay)).softmax(-1) @ net.value(h)


def positions(net: Any, x: Tensor) -> Tensor:
    """Looks up its positions with a batch of one, which broadcasts."""
    return net.head(net.tokens(x) + net.positions(torch.arange(x.shape[1])[None]))


ENCODER, NORM = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), nn.LayerNorm(6)
#: By the reports: models of tokens or images, and the losses ``(B,)`` of their output.
REPORTED: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "Opacus #413, PyTorch #80951: tied weights": (tied, squares),
    "Opacus #578: one layer norm in two places": (
        lambda: nn.Sequential(nn.Embedding(9, 6), NORM, nn.Linear(6, 6), NORM), squares),
    "BackPACK #263, #327: layer norm": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)), squares),
    "BackPACK #270, Opacus #639: LSTM in a module": (lambda: decoder(nn.LSTM), squares),
    "BackPACK #270, Opacus #639: GRU in a module": (lambda: decoder(nn.GRU), squares),
    "Opacus #639: attention": (
        lambda: Net(attention, embed=nn.Embedding(9, 6), key=nn.Linear(6, 6), value=nn.Linear(6, 6),
                    decay=nn.Parameter(torch.rand(1))), squares),
    "Opacus #841: positions": (
        lambda: Net(positions, tokens=nn.Embedding(9, 6), positions=nn.Embedding(5, 6), head=nn.Linear(6, 9)), squares),
    "PyTorch #122729: checkpoint": (
        lambda: Net(lambda net, x: checkpoint(net.layer, net.embed(x), use_reentrant=False), embed=nn.Embedding(9, 6),
                    layer=ENCODER), squares),
    "Opacus #792: ignored tokens": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)), counted),
    "Opacus #646: spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.Flatten(), nn.Linear(64, 3)).eval(), squares),
}  # fmt: skip


@pytest.mark.parametrize("report", REPORTED)
def test_reported_models(report: str) -> None:
    torch.manual_seed(0)
    make, loss = REPORTED[report]
    model = make().double()
    check_losses(model, lambda x: loss(model(x)), torch.randn(4, 2, 6, 6).double() if "spectral" in report else TOKENS)


def test_batch_norm_is_exact_in_evaluation_mode_and_refused_in_training_mode() -> None:
    """Opacus #673, BackPACK #239."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double().eval()
    images = torch.randn(4, 2, 6, 6).double()
    check_losses(model, lambda x: squares(model(x)), images)
    with pytest.raises(ValueError, match=r"its batch norm '1' is in training mode.*call model.eval\(\)"):
        check_losses(model.train(), lambda x: squares(model(x)), images)


def test_adapters_and_a_layer_without_use() -> None:
    """Opacus #732."""
    torch.manual_seed(0)
    down, up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    model = Net(lambda net, h: net.base(h) + net.up(net.down(h)), base=nn.Linear(6, 6), unused=nn.Linear(6, 6),
                down=down, up=up).double()  # fmt: skip
    check_losses(model, lambda x: squares(model(x)), torch.randn(4, 5, 6).double())
    model.base.requires_grad_(False)
    with fastgrad.clip_gradients(model, max_norm=0.1) as clipped:
        clipped.backward(squares(model(torch.randn(4, 5, 6).double())))
    assert model.base.weight.grad is None
    assert up.weight.grad is not None
