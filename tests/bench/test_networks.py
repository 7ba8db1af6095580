"""Published networks of the tables: the right file or a reason."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch

from bench.detection.networks import PUBLISHED
from bench.detection.registry import NotRun


def test_a_network_whose_weights_are_nowhere_is_not_run(tmp_path: Path) -> None:
    nowhere = PUBLISHED["densenet"]._replace(url=(tmp_path / "absent").as_uri())
    with pytest.raises(NotRun, match="cannot be downloaded"):
        nowhere.load(tmp_path / "cache" / "weights")


def test_weights_are_those_that_were_published(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"another file")
    with pytest.raises(ValueError, match="SHA-256"):
        PUBLISHED["densenet"].load(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_weight_finds_its_place(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    names = {new: old for old, new in published.places.items()}
    weights = {}
    for key, value in published.make().state_dict().items():
        head = next((head for head in names if key.startswith(head)), None)
        if head is not None:
            weights[names[head] + key[len(head) :]] = torch.full_like(value, 2)
    path = tmp_path / "weights"
    torch.save({"state_dict": weights}, path)
    loaded = published._replace(digest=sha256(path.read_bytes()).hexdigest()).load(path)
    assert all((value == 2).all() for value in loaded.parameters())
    assert loaded(torch.rand(2, 3, 32, 32)).shape == (2, 10)
