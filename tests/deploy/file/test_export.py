from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_models import TinyTwoStage
from exported_models import X, shapes
from python_process import run_python
from torch import nn

import fastgrad
from fastgrad.deploy.file.describe import describe
from fastgrad.deploy.file.description import DTYPES, Description, normalize_pixels
from fastgrad.deploy.file.export import compile_function, export
from fastgrad.deploy.file.package import ModelPackage, read_description


def test_equal_to_the_live_model(model_file: Path) -> None:
    live, package = TinyTwoStage(), ModelPackage(model_file)
    assert package.description.evidence == live.alarms
    generator = torch.Generator().manual_seed(3)
    for batch in (1, 2, 3, 17, 64):
        x = torch.randn(batch, *live.shape, generator=generator)
        (prediction, evidence), (expected, parts) = package.explain(x), live.explain(x)
        assert list(evidence) == list(parts)
        for ours, theirs in zip((*prediction[:3], *evidence.values()), (*expected, *parts.values()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(prediction.uncertainty, package(x).uncertainty)
        columns = [prediction.probabilities, prediction.uncertainty[:, None], torch.stack([*evidence.values()], 1)]
        np.testing.assert_array_equal(package.rows(x), torch.cat(columns, 1).double().numpy())


def test_without_fastgrad(tiny_package: Path, tmp_path: Path) -> None:
    live = TinyTwoStage()
    x = torch.randn(5, *live.shape, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys
sys.modules['fastgrad'] = None
import torch
model = torch._inductor.aoti_load_package({str(tiny_package)!r})
torch.save(tuple(model(torch.load("x.pt"))), "out.pt")
"""
    run_python("-c", code, cwd=tmp_path)
    *answer, evidence = torch.load(tmp_path / "out.pt")
    assert evidence.shape == (5, 2)
    for ours, theirs in zip(answer, live(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_travels_in_the_file(model_file: Path) -> None:
    live = TinyTwoStage()
    description = read_description(model_file)
    assert description.input_shape == live.shape
    assert description.labels == ["cat", "dog", "cow", "hen"]
    assert (description.mean, description.std) == ([0.5] * 3, [0.25] * 3)
    assert description.threshold == live.threshold(0.05)
    assert description.threshold_at(0.01) == live.threshold(0.01)
    assert sum(description.histogram["counts"]) == 200
    assert description.score_reference().counts.sum() == 100
    with pytest.raises(ValueError, match=r"0\.01.*it was 0\.3"):
        description.threshold_at(0.3)
    if model_file.suffix == ".pt2":
        with zipfile.ZipFile(model_file) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/extra/fastgrad.json"))
            assert json.loads(archive.read(member))["classes"] == 4


def test_thresholds_and_histogram() -> None:
    scores = 1 + np.arange(40) * np.finfo(float).eps / 4
    found = describe(TinyTwoStage(), X, ".pt2", scores=scores, false_alarm_rate=np.float32(0.1), max_batch=np.int64(8))
    assert found.false_alarm_rate == pytest.approx(0.1)
    assert found.max_batch == 8
    assert sum(found.histogram["counts"]) == 40
    # Without thresholds of its own: at most rate * (n + 1) - 1 of 99 scores lie above one.
    found = describe(Mute(), X, ".pt2", scores=np.arange(99.0))
    assert found.thresholds == [(0.01, 98.0), (0.02, 97.0), (0.05, 94.0), (0.1, 89.0), (0.2, 79.0)]
    # One that the user chose stands for its rate, also where there is nothing to calibrate on.
    found = describe(Mute(), X, ".pt2", scores=np.arange(99.0), threshold=95.5)
    assert (found.threshold, dict(found.thresholds)[0.05]) == (95.5, 95.5)
    found = describe(Mute(), X, ".pt2", threshold=7.0, false_alarm_rate=0.3)
    assert (found.threshold, found.thresholds) == (7.0, [(0.3, 7.0)])


def test_risk_threshold_and_limit() -> None:
    random = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 4, generator=random), torch.randint(3, (60,), generator=random)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    two_stage = fastgrad.TwoStageModel(network, blocks=["logits"]).fit([(x, labels)], challenges=None)
    found = describe(two_stage, x[:2], ".pt2", risk_threshold=0.25)
    # Without challenges there is no limit.
    assert (found.risk, found.risk_threshold, found.wrong_above) == (True, 0.25, None)
    two_stage.risk_.options["wrong_above"] = 0.125
    found = describe(two_stage, x[:2], ".pt2")
    assert (found.risk, found.risk_threshold, found.wrong_above) == (True, None, 0.125)
    with pytest.raises(ValueError, match=r"risk_threshold must be None or a number from 0 to 1, .*; it was -inf"):
        describe(two_stage, x[:2], ".pt2", risk_threshold=-np.inf)


def test_detectors_own_rate() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    detector = fastgrad.UncertaintyDetector(log=False, false_alarm_rate=0.3)
    two_stage = fastgrad.TwoStageModel(network, detector=detector, blocks=["logits"]).fit(
        [torch.randn(40, 4)], challenges=None
    )
    own, chosen = (describe(two_stage, torch.randn(2, 4), ".pt2", false_alarm_rate=rate) for rate in (None, 0.25))
    usual = describe(TinyTwoStage(), X, ".pt2")
    assert [one.false_alarm_rate for one in (own, chosen, usual)] == [0.3, 0.25, 0.05]
    assert own.threshold == two_stage.threshold()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_pixels_are_normalized_before_rounding(dtype: str) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    exact = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = normalize_pixels(Description((3, 1, 256), dtype, 2, 8, "cpu", mean=mean, std=std), pixels)
    torch.testing.assert_close(found, exact.to(DTYPES[dtype]), rtol=1e-6, atol=1e-6)


def test_inputs_with_graph_or_lazy_negation(model_file: Path) -> None:
    package, x = ModelPackage(model_file), torch.randn(2, 3, 8, 8)
    for same in (x.clone().requires_grad_(), torch.complex(x, -x).conj().imag):
        assert torch.equal(package(same).logits, package(x).logits)


def test_wrong_inputs(model_file: Path) -> None:
    package = ModelPackage(model_file)
    for x in (torch.zeros(0, 3, 8, 8), torch.zeros(2, 3, 8, 9), torch.zeros(65, 3, 8, 8), torch.zeros(8)):
        with pytest.raises(ValueError, match="x must have shape"):
            package(x)
    with pytest.raises(TypeError, match="float64"):
        package(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor; it was ndarray"):
        package(np.zeros((1, 3, 8, 8), np.float32))


class Mute(nn.Module):
    """Three answers and no reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTwoStage()
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.inner(x)


class Unsteady(TinyTwoStage):
    """What an input is answered depends on more than the input."""

    how = "plain"

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        beside = {
            "plain": lambda: 0,
            "random": lambda: torch.rand(()),
            "buffer": lambda: self.calls.add_(1),
            "batch": lambda: x.mean(0),
        }
        return super().forward(x + beside[self.how]())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"two_stage": lambda x: x}, TypeError, "two_stage must be"),
        ({"example_input": X.long()}, TypeError, r"floating dtype; it was torch\.int64\. .* integers as x\.long\(\)"),
        ({"example_input": {"x": X}}, TypeError, "it was dict. Before fit, wrap a network with other inputs"),
        ({"example_input": X[:0]}, ValueError, "at least one input"),
        ({"path": "model.pth"}, ValueError, r"end in \.pt2 or \.onnx"),
        ({"path": "no/such/folder/model.pt2"}, ValueError, "existing folder"),
        ({"path": "folder.pt2"}, ValueError, "existing folder, and no folder; it was 'folder.pt2'"),
        ({"path": "m.onnx", "example_input": X.bfloat16()}, ValueError, r"another dtype for an \.onnx: .* in bfloat16"),
        ({"labels": ["a"]}, ValueError, "labels must be None or 4 names, one a class, in UTF-8; it was"),
        ({"labels": "abcd"}, ValueError, "labels must be None or 4 names, one a class, in UTF-8; it was .abcd."),
        ({"labels": {"a", "b", "c", "d"}}, ValueError, "labels must be None or 4 names"),
        ({"labels": dict(enumerate("abcd"))}, ValueError, "labels must be None or 4 names, .* it was {0: 'a'"),
        ({"labels": b"abcd"}, ValueError, "labels must be None or 4 names"),
        ({"example_input": X * torch.nan}, ValueError, "example_input must be real inputs; the logits of the first"),
        ({"labels": 4}, ValueError, "labels must be None or 4 names, one a class, in UTF-8; it was 4"),
        ({"mean": [0.5]}, ValueError, r"mean must be None or a finite number a channel of images \(3, 8, 8\)"),
        ({"mean": "grey"}, ValueError, "mean must be numeric"),
        ({"mean": 0.5}, ValueError, "mean must be None or a finite number a channel"),
        ({"std": [0.5, 0.0, 0.5]}, ValueError, "std must be None or a positive number a channel"),
        ({"std": [1, 1, float("nan")]}, ValueError, "std must be None or a positive number a channel"),
        ({"example_input": [1.0]}, TypeError, r"example_input must be one torch\.Tensor .*; it was list"),
        ({"false_alarm_rate": 1.5}, ValueError, r"false_alarm_rate must lie in \(0, 1\); it was 1\.5"),
        (
            {"risk_threshold": 0.5},
            ValueError,
            "risk_threshold must be None or a number from 0 to 1, in a file with risk",
        ),
        ({"threshold": np.nan}, ValueError, "threshold must be None or a finite number; it was nan"),
        ({"tolerance": None}, TypeError, "tolerance must be a number; it was None"),
        ({"tolerance": 0}, ValueError, r"tolerance must lie in \(0, inf\]; it was 0"),
        ({"false_alarm_rate": "5 %"}, TypeError, "false_alarm_rate must be a number; it was '5 %'"),
        ({"max_batch": 0}, ValueError, "max_batch"),
        ({"max_batch": 2**21}, ValueError, r"max_batch must be an integer from 1 to 2\*\*20; it was 2097152"),
        ({"scores": np.zeros(3)}, ValueError, "at least 20"),
        ({"scores": np.zeros((30, 2))}, ValueError, "one-dimensional"),
        ({"scores": torch.full((30,), torch.nan, dtype=torch.bfloat16)}, ValueError, "scores must be finite"),
        ({"two_stage": nn.Flatten().eval()}, ValueError, "must return"),
        ({"two_stage": nn.Flatten().train()}, ValueError, "evaluation mode"),
        ({"evidence": 1}, TypeError, "evidence must be True or False; it was 1"),
        ({"two_stage": Mute(), "evidence": True}, ValueError, "evidence must be False for .* a Mute"),
        ({"two_stage": Unsteady("random")}, ValueError, "same answers at every call; .* draw other random numbers"),
        ({"two_stage": Unsteady("buffer")}, ValueError, "same answers at every call; .* find its buffers changed"),
        ({"two_stage": Unsteady("batch"), "example_input": shapes(1, 0)[0]}, ValueError, "whatever other inputs"),
    ],
)
def test_bad_arguments(
    change: dict, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.pt2").mkdir()
    arguments = {"two_stage": TinyTwoStage(), "example_input": X, "path": "m.pt2", **change}
    with pytest.raises(error, match=message):
        export(**arguments)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.pt2"]


def test_block_that_needs_gradients(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    live = fastgrad.TwoStageModel(net, blocks=["logits", "gradients"]).fit([torch.randn(40, 3, 8, 8)], challenges=None)
    for suffix in ("pt2", "onnx"):
        with pytest.raises(ValueError, match="reads 'gradients', which a live model serves and a file does not"):
            export(live, X, tmp_path / f"m.{suffix}")
    assert not list(tmp_path.iterdir())


def test_no_compiler_is_said_plainly(tmp_path: Path) -> None:
    import torch._inductor.config

    # PyTorch 2.15 does not survive monkeypatch: restored that way, the entry is gone.
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(RuntimeError, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        export(TinyTwoStage(), X, tmp_path / "m.pt2")


def test_system_without_compiled_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    with pytest.raises(RuntimeError, match=r"on Windows from PyTorch 2\.9 on; it was 2\.8\.0"):
        compile_function(TinyTwoStage(), X, Path("m.pt2"))
