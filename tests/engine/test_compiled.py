"""Models whose blocks are compiled: recorded exactly, and compiled no more often than without fastgrad."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import assert_norms, inputs
from torch import Tensor, nn

import fastgrad

X = inputs(4, 3)


class Block(nn.Module):
    """A layer whose calls torch.compile traces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


@pytest.fixture(autouse=True)
def _compiled_code_of_other_tests_is_forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def blocks(compilations: list[int]) -> nn.Module:
    """Two compiled blocks and a head; each compilation is noted."""

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        compilations.append(1)
        return graph.forward

    model = nn.Sequential(Block(), Block(), nn.Linear(3, 2)).double()
    for block in list(model)[:2]:
        block.compile(backend=backend)
    return model


def test_contexts_compile_blocks_once() -> None:
    compilations: list[int] = []
    model = blocks(compilations)
    with torch.compiler.set_stance("force_eager"):
        truth = loss_norms((model(row).square().sum() for row in X.split(1)), model)
        plain = model(X).detach()
    counts = []
    for _ in range(12):  # beyond the number of compilations at which torch.compile gives up
        with fastgrad.record(model), torch.no_grad():
            assert torch.equal(model(X), plain)
        assert_norms(model, truth, X)
        with torch.no_grad():
            model(X)
        counts.append(len(compilations))
    assert counts[0] == counts[-1]


def test_compiled_blocks_keep_no_model() -> None:
    compilations: list[int] = []
    model = blocks(compilations)
    with fastgrad.record(model), torch.no_grad():
        model(X)
        copied = copy.deepcopy(model[0])
        inside = model[0].forward
    assert not {"forward", "call"} & model[0].__dict__.keys()
    assert torch.equal(inside(X), copied(X))
    torch.compiler.reset()
    gone = weakref.ref(model[0].layer)
    del model, copied, inside
    gc.collect()
    assert gone() is None
