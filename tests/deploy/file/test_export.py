from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_models import TinyTwoStage
from exported_models import FORMS, X, shapes, two_stage_model
from python_process import run_python
from torch import nn

import fastgrad
import fastgrad.deploy.file.export as export_module
from fastgrad.deploy.file.description import DTYPES, normalize_pixels
from fastgrad.deploy.file.export import compile_function, export, trace
from fastgrad.deploy.file.package import Description, ModelPackage, PackageError, read_description
from fastgrad.detector.constants import WEIGHT


def test_equal_to_the_live_model(tiny_package: Path) -> None:
    live, package = TinyTwoStage(), ModelPackage(tiny_package)
    generator = torch.Generator().manual_seed(3)
    for batch in (1, 2, 3, 17, 64):
        x = torch.randn(batch, *live.shape, generator=generator)
        for ours, theirs in zip(package(x)[:3], live(x)[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_evidence_is_a_fourth_output(tiny_package: Path, tiny_explained: Path) -> None:
    import onnxruntime

    live, package = TinyTwoStage(), ModelPackage(tiny_explained)
    assert package.description.evidence == live.alarms
    generator = torch.Generator().manual_seed(3)
    for batch in (1, 2, 17):
        x = torch.randn(batch, *live.shape, generator=generator)
        (prediction, evidence), (_, expected) = package.explain(x), live.explain(x)[:2]
        assert list(evidence) == list(expected)
        for name, own in evidence.items():
            torch.testing.assert_close(own, expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(prediction.uncertainty, package(x).uncertainty)
    assert len(onnxruntime.InferenceSession(tiny_explained).get_outputs()) == 4
    x = torch.zeros(2, *live.shape)
    assert ModelPackage(tiny_package).explain(x)[1] == {}
    assert len(torch._inductor.aoti_load_package(str(tiny_package))(x)) == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_flipped_bit(model_file: Path, tmp_path: Path, share: float) -> None:
    content = bytearray(model_file.read_bytes())
    content[int(share * len(content))] ^= 1
    (tmp_path / f"m{model_file.suffix}").write_bytes(content)
    with pytest.raises(PackageError, match=r"damaged|not a readable|format"):
        ModelPackage(tmp_path / f"m{model_file.suffix}")


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
    for ours, theirs in zip(torch.load(tmp_path / "out.pt"), live(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_travels_in_the_file(model_file: Path) -> None:
    live = TinyTwoStage()
    description = read_description(model_file)
    assert description.input_shape == live.shape
    assert description.labels == ["cat", "dog", "cow", "hen"]
    assert description.mean == [0.5, 0.5, 0.5]
    assert description.std == [0.25, 0.25, 0.25]
    assert description.threshold == live.threshold(0.05)
    assert description.threshold_at(0.01) == live.threshold(0.01)
    assert sum(description.histogram["counts"]) == 200
    reference = description.score_reference()
    assert reference.counts.sum() == 100
    with pytest.raises(ValueError, match=r"0\.01.*it was 0\.3"):
        description.threshold_at(0.3)


def test_place_of_the_description(tiny_package: Path) -> None:
    with zipfile.ZipFile(tiny_package) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/extra/fastgrad.json"))
        assert json.loads(archive.read(member))["classes"] == 4


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Description]:
    """What stands in files that would be compiled."""
    found: list[Description] = []
    monkeypatch.setattr(export_module, "compile_function", lambda *_, **__: None)
    monkeypatch.setattr(export_module, "compare", lambda path, *_: path.touch())
    monkeypatch.setattr(export_module, "write_description", lambda _, description: found.append(description))
    return found


def test_thresholds_and_histogram(written: list[Description], tmp_path: Path) -> None:
    scores = 1 + np.arange(40) * np.finfo(float).eps / 4
    export(
        TinyTwoStage(), X, tmp_path / "m.pt2", scores=scores, false_alarm_rate=np.float32(0.1), max_batch=np.int64(8)
    )
    assert written[0].false_alarm_rate == pytest.approx(0.1)
    assert written[0].max_batch == 8
    assert sum(written[0].histogram["counts"]) == 40
    # Without thresholds of its own: at most rate * (n + 1) - 1 of 99 scores lie above one.
    export(Mute(), X, tmp_path / "m.pt2", scores=np.arange(99.0))
    assert written[1].thresholds == [(0.01, 98.0), (0.02, 97.0), (0.05, 94.0), (0.1, 89.0), (0.2, 79.0)]
    # One that the user chose stands for its rate, also where there is nothing to calibrate on.
    export(Mute(), X, tmp_path / "m.pt2", scores=np.arange(99.0), threshold=95.5)
    export(Mute(), X, tmp_path / "m.pt2", threshold=7.0, false_alarm_rate=0.3)
    assert (written[2].threshold, dict(written[2].thresholds)[0.05]) == (95.5, 95.5)
    assert (written[3].threshold, written[3].thresholds) == (7.0, [(0.3, 7.0)])


def test_risk_threshold_and_excess(written: list[Description], tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 4, generator=random), torch.randint(3, (60,), generator=random)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    two_stage = fastgrad.TwoStageModel(network, blocks=["logits"]).fit([(x, labels)], None)
    export(two_stage, x[:2], tmp_path / "m.pt2", risk_threshold=0.25)
    two_stage.risk_.options["excess"] = 0.125
    export(two_stage, x[:2], tmp_path / "m.pt2")
    # Without challenges there is no excess.
    assert [(one.risk, one.risk_threshold, one.excess) for one in written] == [(True, 0.25, None), (True, None, 0.125)]
    with pytest.raises(ValueError, match=r"risk_threshold must be None or a number from 0 to 1, .*; it was -inf"):
        export(two_stage, x[:2], tmp_path / "m.pt2", risk_threshold=-np.inf)


def test_detectors_own_rate(written: list[Description], tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    detector = fastgrad.UncertaintyDetector(log=False, false_alarm_rate=0.3)
    two_stage = fastgrad.TwoStageModel(network, detector=detector, blocks=["logits"]).fit([torch.randn(40, 4)], None)
    for given in (None, 0.25):
        export(two_stage, torch.randn(2, 4), tmp_path / "m.pt2", false_alarm_rate=given)
    export(TinyTwoStage(), X, tmp_path / "m.pt2")
    assert [one.false_alarm_rate for one in written] == [0.3, 0.25, 0.05]
    assert written[0].threshold == two_stage.threshold()


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


def test_foreign_and_broken_files(model_file: Path, tmp_path: Path) -> None:
    file, whole = tmp_path / f"m{model_file.suffix}", model_file.read_bytes()
    with pytest.raises(PackageError, match="no such file"):
        ModelPackage(file)
    for content in (b"hello", whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        with pytest.raises(PackageError, match=rf"not a readable \{file.suffix}"):
            ModelPackage(file)


def test_missing_or_foreign_description(tiny_onnx: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(tiny_onnx)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with zipfile.ZipFile(tmp_path / "bare.pt2", "w") as archive:
        archive.writestr("a/b", "")
    for suffix in ("onnx", "pt2"):
        with pytest.raises(PackageError, match=r"not written by fastgrad\.export"):
            ModelPackage(tmp_path / f"bare.{suffix}")
    for content, message in (({"format": 99}, "another format"), ({"format": 1, "input_shape": [1]}, "damaged")):
        with zipfile.ZipFile(tmp_path / "new.pt2", "w") as archive:
            archive.writestr("a/extra/fastgrad.json", json.dumps(content))
        with pytest.raises(PackageError, match=message):
            read_description(tmp_path / "new.pt2")


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
    live = fastgrad.TwoStageModel(net, blocks=["logits", "gradients"]).fit([torch.randn(40, 3, 8, 8)], None)
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


def test_graph_of_one_batch_size() -> None:
    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([row.sum() * i for i, row in enumerate(x)])

    with pytest.raises(RuntimeError, match=r"depends on the batch size.* or a loop over x$"):
        trace(Loop(), X)

    def fixed(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).sum(1) + torch.zeros(int(x.shape[0]))

    with pytest.raises(RuntimeError, match="without int"):
        trace(fixed, X)

    def turned(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            angles = x.detach().flatten(1)[:, :6].requires_grad_()
            grid = nn.functional.affine_grid(angles.view(-1, 2, 3), list(x.shape), align_corners=False)
            return torch.autograd.grad(grid.square().sum(), angles)[0]

    with pytest.raises(RuntimeError, match="PyTorch has for fixed sizes alone"):
        trace(turned, X)


def test_operation_for_values_alone() -> None:
    # As those of quantised networks are.
    library = torch.library.Library("fastgrad_tests", "FRAGMENT")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: 2 * x, "CPU")
    with pytest.raises(ValueError, match=r"for values alone.* PyTorch says: fastgrad_tests\.doubled\.default"):
        trace(torch.ops.fastgrad_tests.doubled, X)

    def without_kernel(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("could not find kernel for quantized.conv2d")

    with pytest.raises(ValueError, match=r"for values alone.* could not find kernel for quantized\.conv2d"):
        trace(without_kernel, X)


def test_network_that_leaves_pytorch() -> None:
    def clipped(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.clip(x.detach().numpy(), 0, 1))

    with pytest.raises(ValueError, match=r"hand them to NumPy.* PyTorch says: \.numpy\(\) is not supported"):
        trace(clipped, X)


def assert_equal(ours: tuple, theirs: tuple) -> None:
    """To 1e-5: logits relative to their size or 1, probabilities and risk absolutely, and each score's p relatively.

    In the uncertainty the challenge classifier's -log p counts `WEIGHT` times, and so does its rounding. For a network
    that was trained: what 1e-7 of rounding becomes depends on how much images differ to the network.
    """
    allowed = ((1e-5, 1e-5), (0.0, 1e-5), (0.0, WEIGHT * 1e-5), (0.0, 1e-5))
    # Without labels there is no risk.
    for got, expected, (relative, absolute) in zip(ours, theirs, allowed[: len(theirs)], strict=True):
        torch.testing.assert_close(got, expected, rtol=relative, atol=absolute)


def outputs(prediction: tuple) -> tuple:
    return tuple(value for value in prediction if value is not None)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form in ("forward", "corrected") else pytest.mark.slow) for form in FORMS]
)
def test_two_stage_model_is_one_graph(form: str) -> None:
    live = two_stage_model(form)
    program = trace(lambda x: outputs(live(x)), X)
    assert not [node for node in program.graph.nodes if "fastgrad" in str(node.target)]
    for batch in (1, 2, 7, 64):
        x, _ = shapes(batch, 2000 + batch)
        assert_equal(program.module()(x), outputs(live(x)))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_stage_model_in_one_file(form: str, tmp_path: Path) -> None:
    live = two_stage_model(form)
    package = ModelPackage(export(live, X, tmp_path / "m.pt2"))
    assert package.description.threshold == pytest.approx(live.threshold(0.05))
    assert package.description.histogram is not None
    for batch in (1, 3, 64):
        x, _ = shapes(batch, 2000 + batch)
        assert_equal(outputs(package(x)), outputs(live(x)))


@pytest.mark.slow
def test_rounding_of_norms_and_gelu(tmp_path: Path) -> None:
    from torch._inductor import decomposition

    known = set(decomposition.decompositions)
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(256)).eval()
    compile_function(lambda x: net(x).detach(), torch.zeros(2, 4, 8, 8), tmp_path / "n.pt2")
    assert set(decomposition.decompositions) == known
    run = torch._inductor.aoti_load_package(str(tmp_path / "n.pt2"))
    for batch in (1, 2, 9):
        x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(run(x), net(x))
