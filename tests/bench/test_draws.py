"""Draws of photographs share no image between their parts, and cases are what they say they are."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("foolbox")
pytest.importorskip("imagecorruptions")
Image = pytest.importorskip("PIL.Image")

from bench.paper import draws  # noqa: E402
from bench.paper.data import photographs, sets  # noqa: E402
from bench.paper.draws import AFTER, CASES, Draw, Sizes  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]
SIZES = (Sizes(8, 4, 12, 4), Sizes(4, 4, 8, 4))


def net(*, pixels: bool = False, size: int = 0) -> nn.Module:
    """Ten shades, told apart by their distance."""
    shades = torch.linspace(0.05, 0.95, 10)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    with torch.no_grad():
        model[2].weight.copy_(40 * shades[:, None].expand(10, 3) / 3)
        model[2].bias.copy_(-20 * shades.square())
    return model.eval()


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    rng = np.random.default_rng(0)

    def packed(labels: np.ndarray) -> dict[str, np.ndarray]:
        files = []
        for label in labels:
            pixels = (255 * (0.05 + 0.1 * label) + rng.integers(-8, 9, (256, 256, 3))).clip(0, 255)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90, subsampling=0)
            files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        return {"test_jpeg": np.concatenate(files), "test_offsets": np.cumsum([0, *map(len, files)])}

    labels = np.arange(24) % 10
    np.savez(tmp_path / "imagenet-sample-256.npz", **packed(labels), test_labels=labels)
    np.savez(tmp_path / "textures-256.npz", **packed(labels % 3))
    np.savez(tmp_path / "scenes.npz", images=rng.integers(0, 256, (8, 28, 28), dtype=np.uint8))
    photographs.photographs.cache_clear()
    monkeypatch.setattr(draws, "network", net)
    return tmp_path


def test_parts_are_disjoint_and_draws_differ(folder: pathlib.Path) -> None:
    first, second = (Draw(folder, folder / "cache", number, SIZES) for number in range(2))
    places = np.concatenate(list(first.places.values()))
    assert len(set(places)) == len(places) == 24
    assert [len(part) for part in second.places.values()] == [4, 4, 8]
    assert not np.array_equal(first.places["fit"][:4], second.places["fit"])
    images, labels = first.clean("calibration")
    assert images.shape == (4, 3, 224, 224)
    assert torch.equal(labels, torch.from_numpy(first.places["calibration"] % 10))
    with pytest.raises(ValueError, match="a draw of 40 photographs"):
        Draw(folder, folder / "cache", 0, (Sizes(20, 10, 10, 4),)).clean("fit")


@pytest.mark.parametrize("name", ["FGSM 2/255", "C&W"])
def test_an_attack_counts_what_misleads(folder: pathlib.Path, name: str) -> None:
    draw = Draw(folder, folder / "cache", 0, SIZES)
    case, after = draw.case(name), draw.case(name + AFTER)
    model = net()
    labels = torch.from_numpy(case.source % 10)
    assert case.tried == after.tried == 4
    assert case.rate == len(case.images) / 4
    assert bool((model(case.images).argmax(1) != labels).all())
    assert bool((model(after.images).argmax(1) != torch.from_numpy(after.source % 10)).all())
    split = photographs.photographs(folder)
    clean = sets.to_tensor(split.images[case.source])
    assert draw.right.all()
    if name.startswith("FGSM"):
        # A step within a byte's rounding, and too small to lead one shade to another.
        assert len(case.images) == 0
    else:
        assert len(case.images) > 0
        assert float((case.images - clean).abs().max()) > 0


def test_cases_come_from_the_cache(folder: pathlib.Path) -> None:
    draw = Draw(folder, folder / "cache", 0, SIZES)
    fog = draw.case("fog")
    assert (fog.group, fog.rate) == (CASES["fog"], 1.0)
    (file,) = (folder / "cache" / "photographs").glob("fog-*.npz")
    stamp = file.stat().st_mtime_ns
    assert torch.equal(Draw(folder, folder / "cache", 0, SIZES).case("fog").images, fog.images)
    assert file.stat().st_mtime_ns == stamp
    other = Draw(folder, folder / "cache", 1, SIZES).case("fog")
    assert len(list((folder / "cache" / "photographs").glob("fog-*.npz"))) == 2
    assert not torch.equal(other.images, fog.images)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"fog-.*\.npz must be a whole file"):
        draw.case("fog")


def test_other_sets_are_enlarged_and_compressed_alike(folder: pathlib.Path) -> None:
    case = Draw(folder, folder / "cache", 0, SIZES).case("grey scenes")
    assert case.images.shape == (4, 3, 224, 224)
    raw = sets.load(folder, "scenes", limit=1).images[0, ..., 0]
    large = np.asarray(Image.fromarray(raw).resize((256, 256), Image.Resampling.BICUBIC))
    wanted = photographs.same_jpeg(np.repeat(large[None, ..., None], 3, -1))
    assert torch.equal(case.images[:1], sets.to_tensor(photographs.crop(wanted)))
    textures = [Draw(folder, folder / "cache", number, SIZES).case("textures").images for number in range(2)]
    assert not torch.equal(*textures)
    with pytest.raises(ValueError, match=r"'scenes'.* must have 9 images; it has 8"):
        photographs.stranger(folder, "scenes", 5, 4)
    with pytest.raises(ValueError, match="name must be one of"):
        Draw(folder, folder / "cache", 0, SIZES).case("PGD")


def test_a_draw_names_the_networks_there_are(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="efficientnet-lite2; it was 'lenet'"):
        Draw(tmp_path, tmp_path, 0, SIZES, "lenet")
