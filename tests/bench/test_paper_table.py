"""A table is one file; what it reads is whole and its own, or a plain message names it; no mean is of fewer cases."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from bench import results_file
from bench.paper import __main__ as command
from bench.paper import cache
from bench.paper.data import sets
from bench.paper.figures import grouped_bars
from bench.paper.rows import Found, detection_rows, mean_rows, pivot
from bench.paper.table import Options, Page, Table


@dataclasses.dataclass
class Shift:
    """Stands for a network: its score of a case is a number."""

    name: str
    made: pathlib.Path

    def prepare(self) -> None:
        cache.arrays(self.made / f"{self.name}.npz", lambda: {"auroc": np.array(0.5 + 0.1 * int(self.name))})

    def auroc(self) -> float:
        return float(cache.read_arrays(self.made / f"{self.name}.npz")["auroc"])


def evaluate(subject: Shift) -> Found:
    return {("net", case, "ours"): subject.auroc() for case in ("fog", "grey")}


def write(options: Options, subjects: Sequence[Shift], found: Sequence[Found]) -> Page:
    rows = detection_rows(found)
    axes = grouped_bars({"ours": [row["auroc"] for row in rows]}, [row["case"] for row in rows])
    return Page(rows, [("## All", pivot(rows, ("fog", "grey"), ("ours",)))], axes)


def table(**changes: object) -> Table:
    made = Table(
        "mine", "My table", (), lambda options: [Shift(n, options.cache) for n in "12"], evaluate, write
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def options(tmp_path: pathlib.Path) -> Options:
    (tmp_path / "data").mkdir()
    return Options(tmp_path / "data", tmp_path / "out", tmp_path / "cache", workers=1)


def test_a_table_is_written_from_its_parts(options: Options) -> None:
    table().run(options)
    found = json.loads((options.out / "mine.json").read_text())
    assert found["rows"][0] == {
        "network": "net", "case": "fog", "method": "ours", "auroc": 0.65, "spread": 0.0707, "seeds": 2,
    }  # fmt: skip
    assert "| ours | 65.0 ± 7.1 | 65.0 ± 7.1 | **65.0** | 65.0 |" in (options.out / "mine.md").read_text()
    assert (options.out / "mine.png").exists()


def test_what_is_needed_is_prepared_once_and_not_measured(options: Options) -> None:
    prepared = []

    class Counted(Shift):
        def prepare(self) -> None:
            prepared.append(self.name)
            super().prepare()

    made = table(
        subjects=lambda options: [Counted(n, options.cache) for n in "12"],
        needed=lambda options: [Counted(n, options.cache) for n in "23"],
    )
    made.run(options)
    assert prepared == ["1", "2", "3"]
    assert json.loads((options.out / "mine.json").read_text())["rows"][0]["seeds"] == 2


def test_missing_sets_are_named_before_any_work(options: Options) -> None:
    def fail(subject: Shift) -> Found:
        raise AssertionError("evaluated")

    with pytest.raises(
        FileNotFoundError, match=r"textures\.npz or textures-32\.npz.*'textures'.*omniglot\.npz"
    ):
        table(sets=("textures", "omniglot"), evaluate=fail).run(options)
    assert not options.cache.exists()
    with pytest.raises(FileNotFoundError, match=r"--data must name a folder.*none"):
        table().run(dataclasses.replace(options, data=options.data / "none"))


def test_the_command_says_what_is_wrong(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("foolbox")
    pytest.importorskip("pytorch_ood")
    assert command.main(["ood", "--quick", "--data", str(options.data), "--cache", str(options.cache)]) == 2
    assert "cifar10.npz or cifar10-jpeg.npz for the set 'cifar10'" in capsys.readouterr().err


def _truncate(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_cache_is_named(options: Options) -> None:
    table().run(options)
    _truncate(options.cache / "2.npz")
    with pytest.raises(ValueError, match=r"2\.npz must be a whole file.*Delete it"):
        table().run(options)


def test_a_damaged_set_is_named(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "textures.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    assert len(sets.load(tmp_path, "textures").images) == 9
    _truncate(tmp_path / "textures.npz")
    with pytest.raises(ValueError, match=r"textures\.npz must be a whole \.npz file"):
        sets.load(tmp_path, "textures")


def test_a_set_without_labels_is_named(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "mnist.npz", test_images=np.zeros((9, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="'mnist' must have labels"):
        sets.load(tmp_path, "mnist").labelled()
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz with a train part"):
        sets.load(tmp_path, "mnist", "train")


def _refuse(model: nn.Module) -> None:
    raise AssertionError("trained again")


def _keep(size: int) -> Callable[[nn.Module], None]:
    return lambda model: nn.init.constant_(model.weight, size)  # type: ignore[arg-type, return-value]


def test_a_network_of_another_recipe_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net.pt"
    cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _keep(3))
    model = cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _refuse)
    assert torch.equal(model.weight, torch.full((3, 2), 3.0))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r'net\.pt must hold .*\{"epochs": 60\}; it holds that of \{"epochs": 8\}'
    ):
        cache.weights(path, nn.Linear(2, 3), {"epochs": 60}, _refuse)
    with pytest.raises(ValueError, match=r"net\.pt must be a whole file"):
        cache.weights(path, nn.Linear(5, 3), {"epochs": 8}, _refuse)
    torch.save(nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(ValueError, match=r"net\.pt must hold .*it holds that of null"):
        cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _refuse)
    _truncate(path)
    with pytest.raises(ValueError, match=r"net\.pt must be a whole file.*Delete it"):
        cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _refuse)


def test_digests_tell_weights_and_arrays_apart() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    assert cache.digest(model, {"a": 1}) == cache.digest(model, {"a": 1})
    assert cache.digest(model) != cache.digest(other)
    assert cache.digest(np.arange(3)) != cache.digest(np.arange(4))


def test_no_mean_leaves_anything_out() -> None:
    whole: Found = {
        ("net", case, method): 0.5 for case in ("fog/1", "fog/2") for method in ("ours", "theirs")
    }
    less = {key: value for key, value in whole.items() if key != ("net", "fog/2", "theirs")}
    other: Found = {("digits", "grey", "ours"): 0.5}
    assert len(detection_rows([whole, other])) == 5
    with pytest.raises(ValueError, match="theirs on fog/2 of net must be a number for every seed"):
        detection_rows([whole, less])
    with pytest.raises(ValueError, match="theirs on fog/2"):
        detection_rows([whole | {("net", "fog/2", "theirs"): float("nan")}])
    rows = detection_rows([less])
    with pytest.raises(ValueError, match=r"theirs must have every case.*fog/2"):
        pivot(rows, ("fog/1", "fog/2"), ("ours", "theirs"))
    with pytest.raises(ValueError, match="theirs must have all 2 numbers of fog"):
        mean_rows(rows, {"fog": ("fog/1", "fog/2")})


def test_a_damaged_list_of_rows_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "time.json"
    results_file.append(path, {"case": "a", "median_s": 1.0})
    assert results_file.load(path) == [{"case": "a", "median_s": 1.0}]
    _truncate(path)
    with pytest.raises(ValueError, match=r"time\.json must be a whole JSON file"):
        results_file.load(path)
