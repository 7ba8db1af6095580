"""Files of fitted parts: equal when loaded, refused when foreign or changed, and what they take along."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx_needed import skip_without_onnx
from python_process import run_python
from small_images import images, loader, small_network

import fastgrad
from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, Block, register_block
from fastgrad.deploy.file.describe import describe
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.detector import storage
from fastgrad.scores.one_class import distance


def test_round_trip_is_bit_equal(fitted, tmp_path):
    path = fitted.save(tmp_path / "estimators.safetensors")
    loaded = TwoStageModel.load(path, fitted.model)
    x = images(9, 3)
    torch.testing.assert_close(loaded.explain(x), fitted.explain(x), rtol=0, atol=0)
    assert loaded.alarms == fitted.alarms
    assert loaded.threshold(0.1) == fitted.threshold(0.1)
    assert str(loaded.report()) == str(fitted.report())
    assert torch.equal(loaded.calibration_scores, fitted.calibration_scores)
    again = loaded.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_parts_in_a_new_process():
    code = (
        "import fastgrad; fastgrad.TwoStageModel; from fastgrad.scores.fitted import Fitted; "
        "assert {'Correction', 'Temperature', 'NoisyOr', 'Risk'} <= set(Fitted.kinds)"
    )
    run_python("-c", code)


def resigned(data, *change):
    """Anyone can write the digest of a file, also of one whose tensors are not what it says."""
    digest = re.search(rb'digest\W+"([0-9a-f]{64})', data)[1]
    assert change[0] in data
    data = data.replace(digest, storage._EMPTY.encode(), 1).replace(*change, 1)
    return data.replace(storage._EMPTY.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


FOREIGN = r"path must be a file written by TwoStageModel\.save; .* is not one"
CHANGED = "has been changed or damaged"
FILES = {
    "empty": (lambda data: b"", FOREIGN),
    "an archive": (lambda data: b"PK\x03\x04 not ours", FOREIGN),
    "a pickle": (lambda data: pickle.dumps({"weight": 3.0}), FOREIGN),
    "foreign tensors": (lambda data: safetensors.torch.save({"weight": torch.zeros(3)}), FOREIGN),
    "half": (lambda data: data[: len(data) // 2], CHANGED),
    "a byte less": (lambda data: data[:-1], CHANGED),
    "a byte more": (lambda data: data + b"0", CHANGED),
    "other places": (lambda data: resigned(data, b'"data_offsets":[0,', b'"data_offsets":[1,'), FOREIGN),
    "a part renamed": (lambda data: resigned(data, b"detector.final.", b"detector.other."), FOREIGN),
    "a later format": (
        lambda data: resigned(data, rb"\"format\": 4", rb"\"format\": 5"),
        "has format 5; this version of fastgrad reads format 4",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_refused(fitted, tmp_path, case):
    change, message = FILES[case]
    path = fitted.save(tmp_path / "m.safetensors")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TwoStageModel.load(path, fitted.model)


def altered(value):
    """Yield copies of a JSON value with one part of it replaced by another type, or left out."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield {name: part for name, part in value.items() if name != key}
            yield from ({**value, key: other} for other in altered(own))
    elif isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in altered(value[0]))
    yield from (other for other in (None, "a", 7, [], {}) if type(other) is not type(value))


def test_altered_descriptions(tmp_path):
    """Whoever writes the digest anew gets a message, or a model: nothing else is raised."""
    model = TwoStageModel(small_network(), blocks=["logits", "activations"]).fit(loader(60), challenges=None)
    data = model.save(tmp_path / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    content = json.loads(header["__metadata__"]["fastgrad"]) | {"digest": storage._EMPTY}
    said = []
    # Every seventh: there are more than a thousand.
    for other in itertools.islice(altered(content), 0, None, 7):
        if not isinstance(other, dict) or other.get("digest") != storage._EMPTY:
            continue
        text = json.dumps(header | {"__metadata__": {"fastgrad": json.dumps(other)}}).encode()
        whole = len(text).to_bytes(8, "little") + text + data[size:]
        path = tmp_path / "altered.safetensors"
        path.write_bytes(whole.replace(storage._EMPTY.encode(), hashlib.sha256(whole).hexdigest().encode(), 1))
        try:
            TwoStageModel.load(path, model.model)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 30
    ours = re.compile("path must be a file written by|has format|an unknown part|its parameters differ|unknown: ")
    assert all(map(ours.search, said))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes of this kind")
def test_a_pipe_is_no_file(fitted, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=FOREIGN):
            TwoStageModel.load(path, fitted.model)


def test_any_changed_bit(fitted, tmp_path):
    data = bytearray(fitted.save(tmp_path / "estimators.safetensors").read_bytes())
    bad = tmp_path / "bad.safetensors"
    rng = np.random.default_rng(0)
    for place in [0, 7, 8, 40, 120, len(data) - 1, *rng.integers(0, len(data), 60).tolist()]:
        changed = data.copy()
        changed[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        with pytest.raises(ValueError, match=r"not one|changed or damaged"):
            TwoStageModel.load(bad, fitted.model)


def test_file_of_another_network(fitted, tmp_path):
    with pytest.raises(ValueError, match="its parameters differ"):
        TwoStageModel.load(fitted.save(tmp_path / "estimators.safetensors"), small_network(1))


@dataclasses.dataclass
class Brightness(Block):
    """A block of the user's, which has no hash."""

    name = "brightness"
    shapes = "(B, 3)"
    scores = (distance,)

    def values(self, forward):
        return forward.image().mean((2, 3))


def test_block_of_the_users(tmp_path):
    two_stage = TwoStageModel(small_network(), blocks=["logits", Brightness()]).fit(loader(120))
    assert two_stage.detector_.evidence_names == ["logits", "brightness", "challenges"]
    x = images(20, 9)
    usual, bright = (two_stage.explain(inputs).evidence["brightness"].mean() for inputs in (x, x + 1))
    assert bright > 4 * usual
    with pytest.raises(ValueError, match=r"use fastgrad\.blocks\.register_block; 'brightness' is not"):
        two_stage.save(tmp_path / "model.safetensors")
    register_block(Brightness)
    try:
        loaded = TwoStageModel.load(two_stage.save(tmp_path / "model.safetensors"), two_stage.model)
        assert torch.equal(loaded(x).risk, two_stage(x).risk)
        named = TwoStageModel(small_network(), blocks=["brightness"]).fit(loader(60), challenges=None)
        assert named.report().kept == ["brightness"]
    finally:
        del BLOCKS["brightness"]
    with pytest.raises(ValueError, match=r"must be registered \(register_block\); unknown: \['brightness'\]"):
        TwoStageModel.load(tmp_path / "model.safetensors", two_stage.model)
    skip_without_onnx()
    file = fastgrad.export(two_stage, x, tmp_path / "model.onnx", evidence=True, tolerance=1e-4)
    package = ModelPackage(file)
    assert package.description.risk
    assert list(package.description.evidence) == ["logits", "brightness", "challenges"]
    torch.testing.assert_close(package(x).risk, two_stage(x).risk, rtol=1e-4, atol=1e-4)


def test_normalisation_in_files(tmp_path):
    mean, std = [0.2, 0.4, 0.5], [0.5, 1.0, 0.25]
    x = (images(60) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for clip, white in ((None, 1), ((0, 255), 255)):
        told = {"mean": [white * m for m in mean], "std": [white * s for s in std], "clip": clip}
        two_stage = TwoStageModel(small_network(), blocks=["logits"]).fit([x], challenges=None, **told)
        two_stage = TwoStageModel.load(two_stage.save(tmp_path / "estimators.safetensors"), two_stage.model)
        np.testing.assert_allclose(two_stage.report().normalisation, [mean, std], rtol=1e-6)
    for given, expected in (({}, (mean, std)), ({"mean": [0.0] * 3, "std": [1.0] * 3}, ([0.0] * 3, [1.0] * 3))):
        description = describe(two_stage, x[:2], ".onnx", **given)
        assert description.mean == pytest.approx(expected[0])
        assert description.std == pytest.approx(expected[1])
