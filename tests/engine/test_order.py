"""Models that move the batch, put samples into another order, or return it in another place: right wherever it is."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import check, check_losses, inputs, parts, routes
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastgrad

X, SEQUENCE = inputs(5, 3), inputs(5, 4, 3)


def written(x: Tensor, there: list[int]) -> Tensor:
    rows = torch.zeros_like(x)
    for place, row in zip(there, x, strict=True):
        rows[place] = row
    return rows


#: How samples come into the order of their first values: from x, the order and its inverse.
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index": lambda x, order, there: x[order],
    "rows": lambda x, order, there: torch.stack([x[i] for i in order.tolist()]),
    "items": lambda x, order, there: x[sorted(range(len(x)), key=lambda i: x[i, 0].item())],
    "array": lambda x, order, there: x[order.numpy()],
    "padded": lambda x, order, there: pad_sequence([x[i][:, None] for i in order.tolist()], True).squeeze(2),
    "one by one": lambda x, order, there: written(x, there.tolist()),
    "take": lambda x, order, there: torch.take(x, order[:, None] * 3 + torch.arange(3)),
    "scatter": lambda x, order, there: torch.zeros_like(x).scatter(0, there[:, None].expand_as(x), x),
    "product": lambda x, order, there: F.one_hot(order, len(x)).to(x) @ x,
    "cat": lambda x, order, there: torch.cat(x.flip(0).chunk(2)[::-1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_in_another_order(way: str) -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(stable=True) if way != "cat" else torch.cat(torch.arange(len(x)).flip(0).chunk(2)[::-1])
        there = order.argsort()
        return net.head(torch.tanh(net.layer(WAYS[way](x, order, there))))[there]

    ordered = X[X[:, 0].argsort()]
    check(parts(function), (ordered,), (ordered.flip(0),), (X[:3],))


def unrolled(net: Any, x: Tensor) -> Tensor:
    rows = torch.zeros_like(x.transpose(0, 1))
    for t in range(len(rows)):
        rows[t] = net.layer(x[:, t])
    return net.head(rows.mean(0))


def encoded(net: Any, x: Tensor) -> Tensor:
    """A layer on tokens, one on windows folded into the batch, and positions that are the same for all."""
    h = net.layer(x.transpose(0, 1)).transpose(0, 1) + net.table(torch.arange(x.shape[1])[None])
    windows = net.conv(h.reshape(-1, 2, 3).mT).unflatten(0, (len(x), -1))
    return net.head(windows.tanh().flatten(3).sum((1, 3)))


#: Of sequences ``(B, T, 3)``: where the batch goes on its way, and the route of the layer's weight.
PLACES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "transposed": (lambda net, x: net.head(net.layer(x.transpose(0, 1)).tanh().mean(0)), "rule"),
    "equation": (lambda net, x: net.head(torch.einsum("btd->tbd", net.layer(x)).tanh().sum(0)), "rule"),
    "folded": (lambda net, x: net.head(net.layer(x.reshape(-1, 3)).tanh().view(x.shape).mean(1)), "rule"),
    "repeated": (
        lambda net, x: net.head(net.layer(x.repeat_interleave(2, 0)).tanh().unflatten(0, (-1, 2)).sum((1, 2))), "rule",
    ),
    "doubled": (lambda net, x: net.head(net.layer(torch.cat([x, -x])).tanh().unflatten(0, (2, -1)).prod(0).sum(1)),
                "rule"),
    "unrolled": (unrolled, "sum"),
    "encoded": (encoded, "rule"),
    "cat": (lambda net, x: net.head(net.layer(torch.cat([x, x[:, :1]], axis=1)).tanh()).mean(1), "rule"),  # type: ignore[call-arg]
    "list": (lambda net, x: net.head(net.layer(x.transpose(0, 1)[[1, 0, 2]]).tanh().mean(0)), "rule"),
    "by name": (lambda net, x: net.head(torch.matmul(x.mean(1), other=net.layer.weight)), "rule"),
    "sample by sample": (lambda net, x: torch.cat([net.head(net.layer(row)[None].mean(1)) for row in x]), "rule"),
    "by a vector": (lambda net, x: net.head(x * (net.layer(x) @ net.scale).unsqueeze(2)).mean(1), "rule"),
    "norms": (lambda net, x: net.head(net.norms(net.layer(x).reshape(-1, 3)).tanh().view(x.shape).mean(1)), "rule"),
    "attention": (lambda net, x: net.head(F.scaled_dot_product_attention(h := net.layer(x), h, h).mean(1)), "rule"),
    "attention, folded": (lambda net, x: net.head(F.scaled_dot_product_attention(
        h := net.layer(x).repeat_interleave(2, 0).unsqueeze(1), h, h).unflatten(0, (-1, 2)).mean((1, 2, 3))), "rule"),
    "vmap": (lambda net, x: torch.func.vmap(lambda row: net.head(row.mean(0)))(x), "alone"),
}  # fmt: skip


@pytest.mark.parametrize("way", PLACES)
def test_the_batch_in_another_place(way: str) -> None:
    function, route = PLACES[way]
    norms = nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm1d(3))
    model = parts(function, table=nn.Embedding(9, 3), conv=nn.Conv1d(3, 3, 2), norms=norms)
    check(model, (SEQUENCE,), (inputs(3, 4, 3),), (SEQUENCE[:1],))
    found = routes(model, SEQUENCE)
    assert (found["layer.weight"], found["head.weight"]) == (route, "alone" if way == "vmap" else "rule")


#: What a model returns for hidden states h ``(B, T, 3)``, and losses ``(B,)`` of it.
RETURNED: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Tensor]]] = {
    "second": (lambda net, h: h.transpose(0, 1), lambda out: out.square().sum((0, 2))),
    "last": (lambda net, h: h.movedim(0, 2), lambda out: out.square().sum((0, 1))),
    "folded": (lambda net, h: h.flatten(0, 1), lambda out: out.unflatten(0, (-1, 4)).square().sum((1, 2))),
    "dictionary": (lambda net, h: {"a": h, "b": [h.mean(1)]}, lambda out: (out["a"].mean(1) * out["b"][0]).sum(1)),
    "number of each": (lambda net, h: h.sum((1, 2)).cos(), lambda out: out),
    "one number, squeezed": (lambda net, h: h.sum((1, 2)).cos().squeeze(), lambda out: out.reshape(-1)),
    "squeezed": (lambda net, h: h[:, :1].squeeze(1), lambda out: out.square().sum(1)),
    "complex": (lambda net, h: torch.fft.fft(h), lambda out: out.abs().square().sum((1, 2))),
    "beside constants": (lambda net, h: (h, torch.tensor([1, torch.nan]), "word"), lambda out: out[0].sum((1, 2))),
    "beside a parameter": (lambda net, h: (h, net.scale * 1), lambda out: out[0].cos().sum((1, 2))),
    "beside what follows from it": (
        lambda net, h: (h, torch.zeros_like(h).masked_scatter(h > 0, h[h > 0])),
        lambda out: (out[0] + out[1]).square().sum((1, 2)),
    ),
    "beside a statistic": (lambda net, h: (h, h.std(0)), lambda out: out[0].square().sum((1, 2))),
    "half": (lambda net, h: h.bfloat16(), lambda out: out.double().sum((1, 2))),
    "in an object": (lambda net, h: types.SimpleNamespace(value=h), lambda out: out.value.square().sum((1, 2))),
    "indices": (lambda net, h: (h, h.argmax(1)), lambda out: out[0].cos().sum((1, 2))),
}


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("way", RETURNED)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_what_a_model_returns(way: str, samples: int) -> None:
    returned, losses = RETURNED[way]
    model, x = parts(lambda net, x: returned(net, net.layer(x * net.scale).tanh())), inputs(samples, 4, 3)
    for _ in range(2):
        check_losses(model, lambda x: losses(model(x)), x)


#: What a model makes of hidden states of all samples: each sample gets its own.
JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.square().sum(),
    "mean": lambda h: h.square().mean(),
    "mean of rows": lambda h: h.square().mean(0).sum(),
    "norm": lambda h: h.norm(),
    "largest": lambda h: h.amax(),
    "of each number": lambda h: h.square().sum(0),
}


@pytest.mark.parametrize("way", JOINED)
@pytest.mark.parametrize("samples", [1, 5])
def test_reductions_over_samples(way: str, samples: int) -> None:
    model, x = parts(lambda net, x: (net.layer(x).tanh(), JOINED[way](net.layer(x).tanh()))), X[:samples]

    def losses(x: Tensor) -> Tensor:
        h, own = model(x)
        return h.square().sum(1) + (own.reshape(len(x), -1).sum(1) if own.numel() else own)

    check_losses(model, losses, x)
    with fastgrad.record(model):
        h, own = model(x)
        assert own.shape == (samples, *JOINED[way](h[:1]).shape)
        for row, alone_ in zip(own, h.split(1), strict=True):
            torch.testing.assert_close(row, JOINED[way](alone_))
