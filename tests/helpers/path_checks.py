"""Models that choose between layers, and checks of every call against a loop over samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from small_nets import Net, recorded
from torch import Tensor, nn

import fastgrad

Call = tuple[tuple[Any, ...], dict[str, Any]]


def loop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``(B, P)``: squared norms of the gradients of each row of the output's sum of squares, along the batch's path."""
    return loss_norms((row.square().sum() for row in model(*args, **kwargs)), model)


def norms_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return recorded(model, lambda: model(*args, **kwargs).square().sum())


def features_of_squares(model: nn.Module, chunk_size: int | None = None) -> fastgrad.GradientFeatures:
    return fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z), chunk_size=chunk_size)


def assert_close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def check(model: nn.Module, calls: Iterable[Call], states: Iterable[dict[str, Any]] = ()) -> None:
    """Every call, by recording, by features and by features of chunks, against the loop.

    Before each call its state's attributes are set on the model.
    """
    model = model.double().eval()
    extractors = [features_of_squares(model), features_of_squares(model, chunk_size=2)]
    pairs: Iterable[Any] = itertools.zip_longest(calls, states, fillvalue={})
    for (args, kwargs), state in pairs:
        vars(model).update(state)
        truth = loop(model, args, kwargs)
        assert_close(norms_of(model, *args, **kwargs), truth)
        for extractor in extractors:
            assert_close(extractor(*args, **kwargs)[1], truth)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modes(net: Any, x: Tensor, mode: Any = None) -> Any:
    """Two layers, of which an argument, an attribute or the data chooses."""
    mode = net.mode if mode is None else mode
    if mode == "functional":
        return net.head(F.linear(x, net.a.weight).tanh())
    return net.head(net.a(x).tanh() if mode in ("a", 0) else net.b(x).tanh())


def two_ways(function: Callable[..., Tensor] = modes) -> Net:
    return Net(function, a=nn.Linear(3, 3), b=nn.Linear(3, 3), head=nn.Linear(3, 2), mode="a")


def one_layer(function: Callable[..., Tensor], **parts: Any) -> Net:
    return Net(function, layer=nn.Linear(3, 3), head=nn.Linear(3, 2), **parts)
