"""The evaluation tables run on a small made-up data folder and write rows of the declared form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

# The benchmarks are no installed package; they lie beside the tests.

pytest.importorskip("foolbox")
pytest.importorskip("imagecorruptions")
pytest.importorskip("pytorch_ood")

from bench.paper import own
from bench.paper.cases import STRANGERS
from bench.paper.data import sets as paper_data
from bench.paper.data.attacks import ATTACKS
from bench.paper.rows import detection_rows
from bench.paper.table import Options
from bench.paper.tables import (
    ablation,
    adversarial,
    baselines,
    corruption,
    introspective,
    ood,
    openood,
    transfer,
)

# Libraries outside this project warn about their own dependencies.
pytestmark = [pytest.mark.filterwarnings("default")]
DETECTION = {"network", "case", "method", "auroc", "spread", "seeds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose class is their colour or shade, and other sets of noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def images(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 10
        shade = (25 * labels).reshape(-1, *[1] * len(shape))
        return (shade + rng.integers(0, 25, (count, *shape))).astype(np.uint8), labels

    for name, shape in (("cifar10", (32, 32, 3)), ("mnist", (28, 28))):
        (train, train_labels), (test, test_labels) = images(800, shape), images(120, shape)
        np.savez(
            root / f"{name}.npz",
            train_images=train,
            train_labels=train_labels,
            test_images=test,
            test_labels=test_labels,
        )
    for names, shape in (
        (("cifar100", "tinyimagenet", "textures"), (32, 32, 3)),
        (("svhn",), (32, 32)),
        (("scenes", "fashion-mnist", "notmnist", "kmnist", "omniglot"), (28, 28)),
    ):
        for name in names:
            np.savez(root / f"{name}.npz", images=rng.integers(0, 256, (24, *shape), dtype=np.uint8))
    return root


@pytest.fixture(scope="module")
def options(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    base = tmp_path_factory.mktemp("paper")
    return Options(
        data=folder, out=base / "out", cache=base / "cache",
        seeds=1, workers=1, fit=80, test=40, case=8, strangers=8, learn=8, cell=2, epochs=2,
    )  # fmt: skip


def table(options: Options, name: str) -> list[dict]:
    found = json.loads((options.out / f"{name}.json").read_text())
    assert set(found) == {"machine", "versions", "revision", "mode", "rows"}
    assert found["mode"] == "quick"
    assert (options.out / f"{name}.md").read_text().startswith("# ")
    assert imread(options.out / f"{name}.png").std((0, 1)).max() > 0.01, "an empty figure"
    return found["rows"]


def detection(rows: list[dict]) -> None:
    for row in rows:
        assert set(row) == DETECTION
        assert 0 <= row["auroc"] <= 1
        assert row["seeds"] == 1
    methods = {row["method"] for row in rows}
    assert own.DEFAULT in methods or "fastgrad" in methods


def test_out_of_distribution(options: Options) -> None:
    ood.TABLE.run(dataclasses.replace(options, network="resnet"))
    rows = table(options, "ood-resnet")
    detection(rows)
    cases = {row["case"] for row in rows}
    assert cases == {*STRANGERS["cifar10"], ood.CONTROL, ood.AGAINST_CONTROL}


@pytest.mark.slow
def test_out_of_distribution_of_digits(options: Options) -> None:
    ood.TABLE.run(options)
    cases = {row["case"] for row in table(options, "ood")}
    assert cases == {*STRANGERS["cifar10"], *STRANGERS["mnist"], ood.CONTROL, ood.AGAINST_CONTROL}


@pytest.mark.slow
def test_the_other_detection_tables(options: Options) -> None:
    for module, name in ((adversarial, "adversarial"), (corruption, "corruption"), (transfer, "transfer")):
        module.TABLE.run(options)
        detection(table(options, name))
    compressed = {adversarial.compressed(name) for name in ATTACKS}
    assert {row["case"] for row in table(options, "adversarial")} == compressed.union(ATTACKS)
    assert len({row["case"] for row in table(options, "corruption")}) == 95
    ablation.TABLE.run(options)
    detection(table(options, "ablation"))
    baselines.TABLE.run(options)
    rows = table(options, "baselines")
    detection([row for row in rows if "case" in row])
    assert all(row["forward_passes"] >= 1 for row in rows if "case" not in row)


@pytest.mark.slow
def test_published_detectors_on_another_network(options: Options) -> None:
    # A network that is right on some image of every class: some detectors need them.
    openood.TABLE.run(dataclasses.replace(options, network="resnet", epochs=12))
    rows = table(options, "openood-resnet")
    together = {row["method"]: row for row in rows if row["case"] == "near and far"}
    scored = [row for row in rows if "auroc" in row]
    assert [row["images"] for row in rows if row["method"] == "network"] == [120]
    assert {row["case"] for row in scored} == {openood.GREY, openood.AGAINST_GREY, *openood.SETS}
    assert {row["method"] for row in scored} == set(together)
    assert set(together) >= {
        own.DEFAULT,
        "gradients one-class",
        "NAC",
        "AdaSCALE",
        "GROOD",
        "fDBD",
        "softmax",
    }
    for row in scored:
        low, high = row["auroc interval"]
        assert 0 <= low <= high <= 1
    assert min(row["passes"] for row in together.values()) > 0
    with pytest.raises(ValueError, match="network must be left out for the table transfer"):
        transfer.TABLE.run(dataclasses.replace(options, network="resnet"))


@pytest.mark.slow
def test_introspective(options: Options) -> None:
    introspective.TABLE.run(options)
    rows = table(options, "introspective")
    assert {(row["technique"], row["method"]) for row in rows} == {
        (technique, method) for technique in introspective.TECHNIQUES for method in introspective.METHODS
    }


@pytest.mark.slow
def test_introspective_on_one_network(options: Options) -> None:
    introspective.TABLE.run(dataclasses.replace(options, network="resnet"))
    rows = table(options, "introspective-resnet")
    assert {row["technique"] for row in rows} == {"plain", "denoising"}
    assert {row["seeds"] for row in rows} == {introspective.SEEDS}
    accuracy = {(row["technique"], row["case"], row["method"]): row["accuracy"] for row in rows}
    for (technique, case, method), found in accuracy.items():  # a temperature changes no prediction
        assert found == accuracy[technique, case, method.removesuffix(", temperature")]
    for row in rows:
        assert row["accuracy_spread"] == 0 or introspective.BASE not in row["method"]
        if row["method"] == introspective.OURS:
            for other in (introspective.BASE, introspective.CONTROL):
                gain, low, high = row[f"gain over {other}"]
                assert low <= gain <= high
                rest = accuracy[row["technique"], row["case"], other]
                assert gain == pytest.approx(row["accuracy"] - rest, abs=2e-4)


def test_rows_hold_the_mean_and_the_spread() -> None:
    key = ("resnet", "fog", "fastgrad")
    (row,) = detection_rows([{key: 0.5}, {key: 0.7}, {key: 0.6}])
    assert row == {
        "network": "resnet",
        "case": "fog",
        "method": "fastgrad",
        "auroc": 0.6,
        "spread": 0.1,
        "seeds": 3,
    }


def test_other_sets_share_the_compression_of_the_first(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    plain = paper_data.load(folder, "cifar10", limit=4)
    assert not plain.compressed
    raw = paper_data.load(folder, "textures", limit=4)
    assert torch.equal(paper_data.stranger(folder, "textures", plain, 4), raw.tensor())
    # The same pictures as JPEG files back to back.
    import io

    from PIL import Image

    files = []
    for image in picture:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "cifar10-jpeg.npz", test_jpeg=np.concatenate(files), test_offsets=offsets)
    np.savez(tmp_path / "textures-32.npz", images=picture)
    compressed = paper_data.load(tmp_path, "cifar10", limit=4)
    assert compressed.compressed
    np.testing.assert_array_equal(compressed.images, paper_data.jpeg(picture[:4]))
    stranger = paper_data.stranger(tmp_path, "textures", compressed, 20)
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(stranger, paper_data.to_tensor(paper_data.jpeg(picture[order])))


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz"):
        paper_data.load(tmp_path, "mnist")
    with pytest.raises(ValueError, match="cifar10"):
        paper_data.load(tmp_path, "imagenet")


def test_published_sizes() -> None:
    from bench.paper.networks import dense_network, residual_network

    def parameters(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert parameters(residual_network(width=64, stages=4, blocks=2, stride=1)) == 11_173_962
    assert parameters(dense_network(layers=16, bottleneck=True, stride=1)) == 769_162
    for model in (residual_network(), dense_network(channels=1)):
        channels = model.normalize.mean.shape[1]
        stages = model.eval().stage_features(torch.rand(2, channels, 28, 28))
        assert [len(stage) for stage in stages] == [2] * 4
