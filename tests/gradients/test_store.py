"""GradientStore: what is stored is what was given, also after a process is killed, and other rows are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgrad import GradientStore
from fastgrad.gradients import store as stores
from fastgrad.gradients.project import Places

SIZE = 5


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def numbers(rows: int, seed: int = 1) -> Tensor:
    """The first of one hundred rows: PyTorch's random numbers depend on how many are drawn."""
    return torch.randn(100, SIZE, generator=torch.Generator().manual_seed(seed))[:rows]


def filled(folder: Path, rows: int = 23) -> GradientStore:
    store = GradientStore(folder, network(), size=SIZE)
    for own in numbers(rows).split(4):
        store.append(own)
    return store


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_products_and_the_best_rows(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BLOCK_BYTES", block)
    store, queries = filled(tmp_path), numbers(3, seed=2)
    scores = numbers(23) @ queries.mT
    assert len(store) == 23
    torch.testing.assert_close(store @ queries.mT, scores)
    for largest in (True, False):
        values, indices = store.topk(queries, 6, largest=largest)
        wanted = scores.mT.topk(6, largest=largest)
        torch.testing.assert_close(values, wanted.values)
        assert torch.equal(indices, wanted.indices)
    assert torch.equal(torch.cat([rows for _, rows in store.blocks()]), numbers(23))


def test_opened_again_it_goes_on(tmp_path: Path) -> None:
    filled(tmp_path, 8)
    # A killed process may have written rows that do not count.
    with open(tmp_path / "rows.f32", "ab") as file:
        file.write(b"\1" * 33)
    store = GradientStore(tmp_path, network(), size=SIZE)
    assert len(store) == 8
    store.append(numbers(11)[8:])
    again = GradientStore(tmp_path, network(), size=SIZE)
    assert torch.equal(torch.cat([rows for _, rows in again.blocks()]), numbers(11))


WRITER = """
import sys, torch
from torch import nn
from fastgrad import GradientStore
model = nn.Linear(2, 2)
nn.init.ones_(model.weight), nn.init.ones_(model.bias)
store = GradientStore(sys.argv[1], model, size=3)
while len(store) < 4000:
    store.append(torch.full((1, 3), float(len(store))))
    print(len(store), flush=True)
"""


def test_killed_it_goes_on_at_the_row(tmp_path: Path) -> None:
    for least in (3, 9, 17):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            seen = next(int(line) for line in run.stdout if int(line) >= least)
            os.kill(run.pid, signal.SIGKILL)
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        store = GradientStore(tmp_path, model, size=3)
        assert len(store) >= seen
        rows = torch.cat([rows for _, rows in store.blocks()])
        assert torch.equal(rows, torch.arange(len(store)).float().unsqueeze(1).expand(-1, 3))


def test_an_empty_store(tmp_path: Path) -> None:
    store = GradientStore(tmp_path, network(), size=SIZE)
    assert (store @ numbers(2).mT).shape == (0, 2)
    store.append(numbers(0))
    assert len(GradientStore(tmp_path, network(), size=SIZE)) == 0


def test_other_rows_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    changed = network()
    changed[1].running_mean += 1
    for model, options, message in (
        (changed, {}, "model must be that of the rows"),
        (network(1), {}, "model must be"),
        (network(), {"size": 6}, "size must be that of the rows in .*, 5; it was 6"),
        (network(), {"seed": 1}, "seed must be"),
        (network(), {"about": "train"}, "about must be"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientStore(tmp_path, model, **{"size": SIZE, **options})


def test_rows_of_another_map_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    drawn = torch.randperm
    Places.of.cache_clear()
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn(n, **options).flip(0))
    try:
        with pytest.raises(ValueError, match="map must be that of the rows in"):
            GradientStore(tmp_path, network(), size=SIZE)
    finally:
        Places.of.cache_clear()


def test_damage_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    index = tmp_path / "rows.json"
    whole = json.loads(index.read_text())
    for text, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({**whole, "rows": -1}), "damaged"),
        (json.dumps({**whole, "rows": 24}), "must hold the 24 rows"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            GradientStore(tmp_path, network(), size=SIZE)


def test_refusals(tmp_path: Path) -> None:
    store, second = filled(tmp_path), GradientStore(tmp_path, network(), size=SIZE)
    for call, error, message in (
        (lambda: store.append(numbers(2)[:, :4]), ValueError, r"rows must have shape \(b, 5\); it was \(2, 4\)"),
        (lambda: store.append(numbers(2).long()), TypeError, "rows must have a floating dtype"),
        (lambda: store.append(numbers(2) * torch.inf), ValueError, "rows must hold finite"),
        (lambda: store @ numbers(2), ValueError, "queries must have shape"),
        (lambda: store @ numbers(2)[0], ValueError, "queries must have shape"),
        (lambda: store.topk(numbers(2), 24), ValueError, "k must be at most the number of rows, 23; it was 24"),
        (lambda: store.topk(numbers(2), 0), ValueError, "k must be an integer of at least 1"),
        (lambda: GradientStore(3, network(), size=SIZE), TypeError, "folder must be a path"),
        (lambda: GradientStore(tmp_path, torch.relu, size=SIZE), TypeError, "model must be a Module"),
    ):
        with pytest.raises(error, match=message):
            call()
    second.append(numbers(1))
    with pytest.raises(RuntimeError, match="another process wrote"):
        store.append(numbers(1))
