"""Networks of the tables: of published ones the right file or a reason, of others the training."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.detection.experiment import NotRun
from bench.detection.networks import KINDS, PUBLISHED, RANGES
from bench.detection.recipes import CHANGES
from bench.detection.train import accuracy, fit, fit_layer, whiten


@pytest.mark.parametrize(
    ("content", "error", "words"), [(None, NotRun, "cannot be downloaded"), (b"another file", ValueError, "SHA-256")]
)
def test_weights_are_those_that_were_published(
    content: bytes | None, error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words):
        PUBLISHED["densenet"]._replace(url=(tmp_path / "absent").as_uri()).load(path)


def test_every_class_of_photographs_has_a_kind() -> None:
    ends = [end for end, _ in RANGES]
    assert ends == sorted(set(ends))
    assert ends[-1] == 1000
    assert len({kind for _, kind in RANGES}) == 8
    assert sum(KINDS) == 1000


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


def test_whitening_filters_see_uncorrelated_patches_and_their_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 3, 12, 12, generator=generator).cumsum(3)  # neighbours are alike
    convolution = nn.Conv2d(3, 64, 3, bias=False)
    rest = convolution.weight[54:].detach().clone()
    whiten(convolution, images)
    outputs = convolution(images).transpose(0, 1).flatten(1)
    # 1e-3 is added to variances of .3 and more.
    torch.testing.assert_close(torch.cov(outputs[:27]), torch.eye(27), rtol=0, atol=0.01)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    assert torch.equal(convolution.weight[54:], rest)


def test_images_grow_in_equal_shares() -> None:
    seen: list[tuple[int, float]] = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((x.shape[-1], float(x.max())))
            return self.layer(x.mean((2, 3)))

    images, labels = torch.ones(8, 3, 8, 8), torch.randint(0, 2, (8,))
    fit(Network(), images, labels, epochs=5, seed=0, batch=8, sizes=(4, 8), change=torch.zeros_like)
    assert seen == [(4, 0), (4, 0), (4, 0), (8, 0), (8, 0)]


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_batches_stays_an_image(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 3, 32, 32)
    found = CHANGES[name](x)
    assert found.shape == x.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert not torch.equal(found, x)


def test_a_last_layer_learns() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(64)
    h, layer = torch.eye(4)[labels], nn.Linear(4, 4)
    fit_layer(layer, h, labels, epochs=20, rate=1e-1, batch=32)
    assert accuracy(layer, h, labels) == 1
