"""Data sets of the detection tables: compression histories, missing files; published sizes; texts and files."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext as does_not_raise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.detection import cache
from bench.detection.architectures import residual_network
from bench.detection.data import files, news, sets


def test_other_sets_share_the_compression_of_the_first(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    files = []
    for image in pictures:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "cifar10-jpeg.npz", test_jpeg=np.concatenate(files), test_offsets=offsets)
    np.savez(tmp_path / "textures-32.npz", images=pictures)
    compressed = sets.load(tmp_path, "cifar10", limit=4)
    assert compressed.compressed
    np.testing.assert_array_equal(compressed.images, sets.jpeg(pictures[:4]))
    order = np.random.default_rng(0).permutation(20)
    other = sets.stranger(tmp_path, "textures", compressed, 20)
    assert torch.equal(other, sets.to_tensor(sets.jpeg(pictures[order])))
    plain = sets.Split("cifar10", pictures, None, False)
    assert torch.equal(sets.stranger(tmp_path, "textures", plain, 20), sets.to_tensor(pictures[order]))


def test_published_sizes() -> None:
    def parameters(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert parameters(residual_network(width=64, stages=4, blocks=2, stride=1)) == 11_173_962
    assert parameters(residual_network(width=16, stages=3, blocks=3, stride=1)) == 272_474


def test_words_are_dropped_and_mistyped_but_keep_their_letters() -> None:
    words = ["the", "quick", "brown", "foxes", "jumped", "over", "lazy", "sleeping", "dogs", "again"] * 30
    rng = np.random.default_rng(0)
    assert 0.5 < len(news._dropped(words, rng)) / len(words) < 0.7
    typed = news._mistyped(words, rng)
    assert [sorted(word) for word in typed] == [sorted(word) for word in words]
    assert typed != words
    shuffled = news._shuffled(words, rng)
    assert shuffled != words
    assert sorted(shuffled) == sorted(words)


def test_files_are_read_from_both_ends() -> None:
    found = files.tokens(b"\n\x00 short file\n")
    assert bytes(found[:12]) == b"\x00 short file"[:12]
    assert bytes(found[-13:]) == b"\n\x00 short file"[-13:]
    assert set(found[13:-14]) == {files.PADDING}
    assert files.tokens(b" \nseven.\n") == files.tokens(b"") is None


@pytest.mark.parametrize("name", [*files.CHANGED, *files.DISGUISED])
def test_files_are_changed(name: str) -> None:
    content, rng = "".join(map(str, range(2000))).encode(), np.random.default_rng(0)
    changed = (files.CHANGED | files.DISGUISED)[name](content, b"another", rng)  # type: ignore[operator]
    assert changed
    assert changed != content


@pytest.fixture
def source() -> files.Files:
    pytest.importorskip("onnxruntime")
    try:
        return files.Files(0)
    except ModuleNotFoundError:
        pytest.skip("magika is not installed")


def test_the_network_of_files_answers_as_its_onnx_file(source: files.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = list(files._folders())
    monkeypatch.setattr(files, "_folders", lambda: iter(everything[:20]))
    inputs, labels = source.files("test", 64)
    assert inputs.shape == (len(labels), 2 * files.ENDS)
    assert (source.model(inputs).argmax(1) == labels).double().mean() > 0.5
    kept, places = source.case("UTF-16", "test", 30)
    assert len(kept) == len(places) <= 30
    assert not {content for content, _ in source._parts["fit"]} & {content for content, _ in source._parts["test"]}
    source._parts["MATLAB data"].clear()
    with pytest.raises(FileNotFoundError, match="files for the case 'MATLAB data'"):
        source.case("MATLAB data", "test", 30)


@pytest.mark.parametrize(("moved", "outcome"), [(1, does_not_raise()), (32, pytest.raises(ValueError, match="differ"))])
def test_files_whose_norm_rounds_do_not_refuse_the_network(
    moved: int, outcome: AbstractContextManager[object], source: files.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as runtime

    texts = torch.randint(32, 127, (32, 2 * files.ENDS), generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession

    class Rounding:
        def __init__(self, path: Path) -> None:
            self.session = session(path)

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            (found,) = self.session.run(names, inputs)
            found[:moved] += 0.002
            return [found]

    monkeypatch.setattr(runtime, "InferenceSession", Rounding)
    monkeypatch.setattr(source, "files", lambda part, count: (texts, None))
    with outcome:
        assert source.model.head.out_features == len(source.kinds)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    made = cache.arrays(tmp_path / "2.npz", lambda: {"a": np.arange(9)})
    assert made["a"].tolist() == cache.arrays(tmp_path / "2.npz", dict)["a"].tolist()
    _truncate(tmp_path / "2.npz")
    with pytest.raises(ValueError, match=r"2\.npz must be a whole file.*Delete it"):
        cache.arrays(tmp_path / "2.npz", dict)


@pytest.mark.parametrize(
    ("name", "part", "error", "words"),
    [("imagenet", "test", ValueError, "name must be one of cifar10, .*; it was 'imagenet'"),
     ("cifar100", "test", FileNotFoundError, r"must hold cifar100\.npz or cifar100-32\.npz with a test part"),
     ("textures", "test", ValueError, r"textures\.npz must be a whole \.npz file"),
     ("letters", "train", FileNotFoundError, r"notmnist\.npz or notmnist-28\.npz with a train part"),
     ("letters", "test", ValueError, "'letters' must have labels")],
)  # fmt: skip
def test_a_set_that_cannot_be_read_is_named(
    name: str, part: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    """Nothing is there of one set; of the others half a file, or a file without labels."""
    np.savez(tmp_path / "textures.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    assert len(sets.load(tmp_path, "textures").images) == 9
    _truncate(tmp_path / "textures.npz")
    np.savez(tmp_path / "notmnist.npz", test_images=np.zeros((9, 28, 28), np.uint8))
    with pytest.raises(error, match=words):
        sets.load(tmp_path, name, part).labelled()


def test_missing_news_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ag-news\.csv"):
        news.News(tmp_path, tmp_path, 0)


def _refuse(model: nn.Module) -> None:
    raise AssertionError("trained again")


def _keep(size: int) -> Callable[[nn.Module], None]:
    return lambda model: nn.init.constant_(model.weight, size)  # type: ignore[arg-type, return-value]


def test_a_network_of_another_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _keep(3))
    model = cache.weights(path, nn.Linear(2, 3), {"epochs": 8}, _refuse)
    assert torch.equal(model.weight, torch.full((3, 2), 3.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'net\.pt must hold .*\{"epochs": 60\}; it holds that of \{"epochs": 8\}'):
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
