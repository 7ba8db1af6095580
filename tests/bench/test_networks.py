"""Published networks of the tables: the right file or a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.detection import networks
from bench.detection.registry import NotRun


def test_a_network_whose_weights_are_nowhere_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "DENSENET", (tmp_path / "absent").as_uri())
    with pytest.raises(NotRun, match="cannot be downloaded"):
        networks.published(tmp_path / "cache")


def test_weights_are_those_that_were_published(tmp_path: Path) -> None:
    (tmp_path / "densenet-cifar10.pth.tar").write_bytes(b"another file")
    with pytest.raises(ValueError, match="SHA-256"):
        networks.published(tmp_path)


def test_every_published_weight_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.dense_network()
    names = {new: old for old, new in networks.PLACES.items()}
    weights = {}
    for name, value in model.state_dict().items():
        head = next((head for head in names if name.startswith(head)), None)
        if head is not None:
            weights[names[head] + name[len(head) :]] = torch.full_like(value, 2)
    path = tmp_path / "densenet-cifar10.pth.tar"
    torch.save({"state_dict": weights}, path)
    monkeypatch.setattr(networks, "DENSENET_SHA256", networks.sha256(path.read_bytes()).hexdigest())
    loaded = networks.published(tmp_path)
    assert all((value == 2).all() for value in loaded.parameters())
    assert loaded(torch.rand(2, 3, 32, 32)).shape == (2, 10)
