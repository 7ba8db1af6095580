"""Models that users of other packages reported: fastgrad's norms of each are those of autograd, or it is refused.

``docs/results/speed.md`` lists the reports.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_nets import check_losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad


def squares(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def check(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = squares) -> None:
    """Compare every norm with that of autograd on the sample alone, in float64."""
    model = model.double()
    check_losses(model, lambda x: loss(model(x)), x.double() if x.is_floating_point() else x)


def tied() -> nn.Module:
    """Opacus #413, PyTorch #80951: an embedding and the last layer hold one weight."""
    model = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9))
    model[2].weight = model[0].weight
    return model


def one_norm_twice() -> nn.Module:
    """Opacus #578: one layer norm serves in two places."""
    norm = nn.LayerNorm(6)
    return nn.Sequential(nn.Embedding(9, 6), norm, nn.Linear(6, 6), norm)


def layer_norm() -> nn.Module:
    """BackPACK #263 and #327."""
    return nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3))


class Decoder(nn.Module):
    """BackPACK #270, and a comment in Opacus #639: recurrent layers in a custom module."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(9, 6), kind(6, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0])


class Attention(nn.Module):
    """Opacus #639: attention with a parameter of its own; queries and keys are one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.value = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.decay = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
        k = self.key(h)
        return (k @ k.mT - distance * F.softplus(self.decay)).softmax(-1) @ self.value(h)


class Positions(nn.Module):
    """Opacus #841: GPT-2 looks up its positions with a batch of one, which broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x) + self.positions(torch.arange(x.shape[1])[None]))


class Checkpointed(nn.Module):
    """PyTorch #122729: ``vmap`` of ``torch.func`` does not support ``checkpoint``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, self.embed(x), use_reentrant=False)


class Adapted(nn.Module):
    """Opacus #732: low-rank adapters, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h) + self.up(self.down(h))


@pytest.mark.parametrize(
    "model",
    [tied, one_norm_twice, layer_norm, lambda: Decoder(nn.LSTM), lambda: Decoder(nn.GRU), Attention, Positions,
     Checkpointed],
    ids=["tied", "one norm twice", "layer norm", "LSTM", "GRU", "attention", "positions", "checkpoint"],
)  # fmt: skip
def test_models_of_tokens(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    check(model(), torch.randint(9, (4, 5)))


def test_ignored_tokens() -> None:
    """Opacus #792: ghost clipping averages over padding, which ``ignore_index`` should leave out."""
    torch.manual_seed(0)
    labels = torch.tensor([1, 4, 2, -100, -100])

    def masked(out: Tensor) -> Tensor:
        each = F.cross_entropy(out.mT, labels.expand(len(out), -1), ignore_index=-100, reduction="none")
        return each.sum(1) / (labels != -100).sum()

    check(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)), torch.randint(9, (4, 5)), masked)


def test_spectral_norm() -> None:
    """Opacus #646: layers with a parametrization have no sampler there."""
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
    check(nn.Sequential(spectral, nn.Flatten(), nn.Linear(64, 3)).eval(), torch.randn(4, 2, 6, 6))


def test_batch_norm_is_exact_in_evaluation_mode_and_refused_in_training_mode() -> None:
    """Opacus #673, BackPACK #239."""
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        torch.randn(4, 2, 6, 6),
    )
    check(model.eval(), images)
    with pytest.raises(ValueError, match=r"its batch norm '1' is in training mode.*call model.eval\(\)"):
        check(model.train(), images)


def test_adapters() -> None:
    torch.manual_seed(0)
    adapted = Adapted()
    check(adapted, torch.randn(4, 5, 6))
    adapted.base.requires_grad_(False)
    with fastgrad.clip_gradients(adapted, max_norm=0.1) as clipped:
        clipped.backward(adapted(torch.randn(4, 5, 6).double()).square().sum((1, 2)))
    assert adapted.base.weight.grad is None
    assert adapted.up.weight.grad.any()
