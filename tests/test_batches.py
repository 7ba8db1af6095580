"""Batches of any structure."""

from __future__ import annotations

import sys
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad import batches

X = torch.arange(12.0).reshape(4, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_only_what_carries_the_batch_is_taken() -> None:
    shared = torch.zeros(2, 3)
    tree = {"x": X, "more": [X + 1, torch.tensor(4.0)], "shared": shared, "flag": True}
    assert batches.batch_size(tree) == 4
    assert len(batches.input_tensors(tree)) == 4
    for index in (slice(1, 3), torch.tensor([1, 2])):
        taken: Any = batches.take(tree, index, 4)
        assert torch.equal(taken["x"], X[1:3])
        assert torch.equal(taken["more"][0], X[1:3] + 1)
        assert taken["shared"] is shared
        assert taken["flag"] is True
    moved: Any = batches.to_device(tree, torch.device("meta"))
    assert moved["more"][1].device.type == "meta"
    with pytest.raises(ValueError, match="inputs must hold a tensor"):
        batches.batch_size({"x": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"inputs with a row for each sample must be dense .* torch\.sparse_coo"):
        batches.take(X.to_sparse(), slice(1, 3), 4)
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(ValueError, match=r"inputs with a row for each sample must be dense .* nested"):
            batches.batch_size(torch.nested.as_nested_tensor([X, X[1:]], layout=layout))
    shared = shared.to_sparse()
    assert batches.take({"x": X, "shared": shared}, slice(1, 3), 4)["shared"] is shared


def test_inputs_of_a_loaders_batch() -> None:
    for batch, beside in (((X, 1), 1), ((X,), None), (X, None)):
        found, other = batches.split_batch("loader", batch)
        assert found is X
        assert other is beside
    assert batches.split_batch("loader", [UserDict(x=X), 0]) == ({"x": X}, 0)
    given = {"x": X, "labels": 2}
    assert batches.split_batch("loader", given) == ({"x": X}, 2)
    assert given["labels"] == 2
    assert batches.as_call(X) == ((X,), {})
    assert batches.as_call(UserDict(x=X)) == ((), {"x": X})
    with pytest.raises(TypeError, match=r"loader must give tensors, mappings or tuples .* gave int"):
        batches.split_batch("loader", (3, X))


@pytest.mark.parametrize("output", [X, {"logits": X}, (X, 1), UserDict(logits=X)])
def test_kinds_of_outputs(output: Any) -> None:
    if isinstance(output, UserDict):
        output.logits = X
    found: Tensor = batches.logits_of(output)
    assert found is X
    assert batches.class_logits(output) is X


def test_what_is_no_logits() -> None:
    with pytest.raises(TypeError, match=r"model must return logits as a tensor.* it returned NoneType"):
        batches.logits_of(None)
    with pytest.raises(ValueError, match=r"shape \(B, N\); it returned \(12,\)"):
        batches.class_logits(X.flatten())


def test_without_a_standard_error_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(batches.bar([1, 2], "name", None)) == [1, 2]
