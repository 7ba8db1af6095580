"""Exported ONNX files: what they answer, what travels in them, and what is refused."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_models import TinyTwoStage
from exported_models import FORMS, X, shapes, two_stage_model
from onnx_needed import WARNINGS, skip_without_onnx
from python_process import run_python
from torch import nn

from fastgrad.deploy.file.comparison import compare, difference
from fastgrad.deploy.file.description import DTYPES, Description, description_text
from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.onnx_file import KEY
from fastgrad.deploy.file.package import ModelPackage, PackageError, read_description
from fastgrad.detector.model import TwoStageModel

onnx = pytest.importorskip("onnx")
skip_without_onnx()
pytestmark = WARNINGS


#: What `export` allows: a p-value map magnifies the rounding of a score.
ROUNDING = 1e-4


def check(package: ModelPackage, live: nn.Module, *batches: torch.Tensor) -> None:
    """The three outputs of the file are the module's."""
    for x in batches:
        for ours, theirs in zip(package(x)[:3], live(x)[:3], strict=True):
            assert difference(ours, theirs) <= ROUNDING, x


@functools.cache
def in_onnx(form: str) -> tuple[TwoStageModel, ModelPackage]:
    """A fitted model, and its file with the evidence."""
    live = two_stage_model(form)
    with tempfile.TemporaryDirectory() as folder:
        return live, ModelPackage(export(live, shapes(8, 3)[0], Path(folder) / "m.onnx", evidence=True))


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "forward" else pytest.mark.slow) for form in FORMS]
)
def test_every_block_in_onnx(form: str) -> None:
    live, package = in_onnx(form)
    assert package.description.threshold == pytest.approx(live.threshold(0.05))
    assert package.description.evidence == live.alarms
    for batch in (1, 3, 8, 64):
        x, _ = shapes(batch, 2000 + batch)
        (prediction, evidence), (expected, reasons, _) = package.explain(x), live.explain(x)
        assert list(evidence) == list(reasons)
        for ours, theirs in zip(prediction[:4], expected[:4], strict=True):  # without labels there is no risk
            assert ours is theirs or difference(ours, theirs) <= ROUNDING
        for block, found in evidence.items():
            assert difference(found, reasons[block]) <= ROUNDING


def test_inputs_that_are_not_finite() -> None:
    live, package = in_onnx("forward")
    for value in (torch.nan, torch.inf, -torch.inf, 1e20, 1e38, 0.0):
        check(package, live, torch.full((2, 3, 8, 8), value))


# Numpy and ONNX Runtime alone, as in a service that has no PyTorch.
BARE = """
import json, sys
for name in ("torch", "fastgrad", "onnx"):
    sys.modules[name] = None
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
description = json.loads(session.get_modelmeta().custom_metadata_map["fastgrad"])
assert [value.name for value in session.get_outputs()] == ["logits", "probabilities", "uncertainty", "evidence"]
assert session.get_inputs()[0].shape == ["batch", *description["input_shape"]]
batches = np.load(sys.argv[2])
found = {}
for name, x in batches.items():
    logits, probabilities, uncertainty, _ = session.run(None, {"input": x})
    found |= {f"{name}-logits": logits, f"{name}-p": probabilities, f"{name}-u": uncertainty}
np.savez(sys.argv[3], **found)
print(json.dumps([description["labels"], description["threshold"]]))
"""


def test_numpy_and_onnx_runtime_alone(tiny_onnx: Path, tmp_path: Path) -> None:
    live = TinyTwoStage()
    batches = {f"{size}": torch.randn(size, *live.shape) for size in (1, 3, 8)}
    np.savez(tmp_path / "x.npz", **{name: x.numpy() for name, x in batches.items()})
    printed = run_python("-c", BARE, tiny_onnx, "x.npz", "out.npz", cwd=tmp_path)
    assert json.loads(printed) == [["cat", "dog", "cow", "hen"], live.threshold(0.05)]
    found = np.load(tmp_path / "out.npz")
    for name, x in batches.items():
        for part, theirs in zip(("logits", "p", "u"), live(x), strict=True):
            assert difference(torch.from_numpy(found[f"{name}-{part}"]), theirs) <= ROUNDING


def test_no_paths_in_the_file(tiny_onnx: Path) -> None:
    assert b"site-packages" not in tiny_onnx.read_bytes()
    assert [prop.key for prop in onnx.load(tiny_onnx).metadata_props] == ["fastgrad", "fastgrad.sha256"]


def outside(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def outside_in_a_branch(model: Any) -> None:
    constant = onnx.helper.make_node("Constant", [], ["c"], value=model.graph.initializer[0])
    branch = onnx.helper.make_graph([constant], "then", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))
    outside(model.graph.node[-1].attribute[0].g.node[0].attribute[0].t)


def zero_a_weight(model: Any) -> None:
    weight = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))


def answer_once(model: Any) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    for output in model.graph.output:
        name, output.name = output.name, f"of one {output.name}"
        model.graph.node.append(onnx.helper.make_node("Gather", [name, "first"], [output.name]))


def describe(model: Any, change: Callable[[str], str] = str) -> None:
    """Change the description, and leave the checksum out."""
    model.metadata_props[0].value = change(model.metadata_props[0].value)
    del model.metadata_props[1:]


#: No digest of the file covers what it reads from elsewhere.
ELSEWHERE = r"m\.onnx is not a readable \.onnx: it keeps data in another file"
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight elsewhere": (lambda model: outside(model.graph.initializer[0]), ELSEWHERE),
    "a branch's constant elsewhere": (outside_in_a_branch, ELSEWHERE),
    "another dtype": (
        lambda model: describe(model, lambda text: text.replace('"float32"', '"float64"')),
        r"m\.onnx cannot be run: ONNX Runtime cannot run it: .*$",
    ),
    "no description": (lambda model: model.ClearField("metadata_props"), r"not written by fastgrad\.export"),
    "a huge description": (
        lambda model: describe(model, lambda _: f"[{'{},' * 2**21}0]"),
        "description must have at most 4194304 bytes",
    ),
    "a changed weight": (zero_a_weight, "is damaged, or was changed after it was written"),
    # A file without a checksum is run.
    "fewer answers": (
        lambda model: (describe(model), answer_once(model)),
        r"gives \[\(1, 4\), \(1, 4\), \(1,\), \(1, 2\)\] for 3 inputs",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("run", [ModelPackage.__call__, ModelPackage.explain, ModelPackage.rows])
def test_changed_file(name: str, run: Callable[..., Any], tiny_onnx: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    change(model := onnx.load(tiny_onnx))
    onnx.save(model, tmp_path / "m.onnx")

    def load_and_run() -> None:
        package = ModelPackage(tmp_path / "m.onnx")
        run(package, torch.zeros(3, 3, 8, 8, dtype=DTYPES[package.description.input_dtype]))

    with pytest.raises(PackageError, match=message):
        load_and_run()


class Changed(TinyTwoStage):
    """Something is added to the uncertainty, which may depend on how often the model was called."""

    calls = 0

    @staticmethod
    def change(probabilities: torch.Tensor, calls: int) -> Any:
        return 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        self.calls += 1
        logits, probabilities, uncertainty = super().forward(x)
        return logits, probabilities, uncertainty + self.change(probabilities, self.calls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, _: torch.linalg.eigvalsh(p.T @ p).sum(),
            r"no ONNX form exists of aten\._linalg_eigh\.default; export to \.pt2",
        ),
        # PyTorch has a translation of it, which does not take weights.
        (
            lambda p, _: torch.bincount(p.argmax(1), p[:, 0], minlength=9)[0],
            r"no ONNX form exists of aten\.bincount\.default; export to \.pt2$",
        ),
        (lambda _, calls: 0.1 * calls, r"the file's uncertainty differ .* at most 0\.0001 is allowed"),
    ],
)
def test_no_file_appears(change: Any, message: str, tmp_path: Path) -> None:
    model = Changed()
    model.change = change
    with pytest.raises(RuntimeError, match=message):
        export(model, X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_file_that_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    def value(name: str, *shape: int | str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, shape)

    conv, x = onnx.helper.make_node("Conv", ["input", "input"], ["logits"]), value("input", "batch", 3, 4, 4)
    graph = onnx.helper.make_graph([conv], "graph", [x], [value("logits", "batch", "n", 1, 1)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    description = Description(input_shape=(3, 4, 4), input_dtype="float64", classes=2, max_batch=8, device="cpu")
    model.metadata_props.add(key=KEY, value=description_text(description))
    onnx.save(model, file := tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match=r"the file cannot be run: .* implementation for Conv.*; export to \.pt2"):
        compare(file, lambda x: (x,), torch.zeros(1, 3, 4, 4, dtype=torch.float64), ROUNDING, 1e-16)


def test_lengths_beyond_the_end(tmp_path: Path) -> None:
    # A text of 2**60 bytes in an entry of five, and an entry that ends within a number.
    for entry in (b"\x0a" + b"\x80" * 8 + b"\x10", b"\x0a"):
        (tmp_path / "long.onnx").write_bytes(bytes([14 << 3 | 2, len(entry)]) + entry)
        with pytest.raises(PackageError, match=r"not a readable \.onnx: it is not a whole"):
            read_description(tmp_path / "long.onnx")


class Words(nn.Module):
    """Its live module has no answer to the input of NaN that other files are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        words = x.round().long()
        known = (words != 0).unsqueeze(-1)
        logits = self.last((self.table(words) * known).sum(1) / known.sum(1).clamp(min=1))
        return logits, logits.softmax(1), -logits.amax(1)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.last = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.last(self.steps(x)[0][:, -1])
        return logits, logits.softmax(1), -logits.amax(1)


#: Texts of twelve words, one of none, and sequences of two steps: each takes a second to translate.
TEXTS = torch.arange(84.0).view(7, 12) % 20 * (torch.arange(7) > 0)[:, None]
SEQUENCES = torch.arange(84.0).view(7, 2, 6).sin()


@pytest.mark.parametrize(("network", "x"), [(Words, TEXTS), (Steps, SEQUENCES)])
def test_other_networks(network: type[nn.Module], x: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = network().eval().requires_grad_(False)
    package = ModelPackage(export(live, x[-3:], tmp_path / "m.onnx"))
    assert package.explain(x)[1] == {}
    check(package, live, x[:1], x[:2], x)


class Ids(nn.Module):
    """A classifier of token ids, which a file gives as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(ids.long()).mean(1))


def test_a_detector_fitted_on_ids_takes_them_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (60, 12))
    live = TwoStageModel(Ids().eval(), blocks=["logits"]).fit(ids, challenges=None)
    package = ModelPackage(export(live, ids[:4].float(), tmp_path / "m.onnx"))
    torch.testing.assert_close(package(ids.float()).uncertainty, live(ids).uncertainty, rtol=1e-3, atol=1e-4)
