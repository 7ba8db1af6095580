"""Calls that must be refused, one or more for every public function and class, by public import paths alone.

`outcome` turns a call into what a user sees. ``python tests/bad_calls.py FILE`` writes the outcomes of all calls.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastgrad
from fastgrad import challenges, interop, metrics, plots
from fastgrad.commands.cli import main
from fastgrad.deploy.drift import DriftMonitor, ScoreReference
from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import Description, ModelPackage, read_description, write_description
from fastgrad.deploy.score.local import score
from fastgrad.deploy.serve.app import create_app
from fastgrad.gradients.features import logits_of
from fastgrad.layers import register_rule

Call = Callable[[Path], Any]
CALLS: dict[str, Call] = {}


def outcome(call: Call, folder: Path) -> list[str]:
    """Type and message of what ``call`` raises; of a command its exit status and what it printed to stderr."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            result = call(folder)
    except SystemExit as stop:
        return [f"exit {stop.code}", _plain(printed.getvalue(), folder)]
    except Exception as error:
        return [type(error).__name__, _plain(str(error), folder)]
    if isinstance(result, int) and not isinstance(result, bool):
        return [f"exit {result}", _plain(printed.getvalue(), folder)]
    return ["nothing", repr(result)]


def _plain(text: str, folder: Path) -> str:
    """Without what depends on the machine, on a version of Python or on the name of a temporary folder."""
    text = text.replace(str(folder), "FOLDER").replace(str(Path.cwd()), "HERE")
    text = re.sub(r"^usage:.*?\n(?=fastgrad)", "", text, flags=re.DOTALL)
    text = re.sub(r" \(choose from .*?\)", "", text)
    return re.sub(r"0x[0-9a-f]+", "0x", text).strip()


def _add(subject: str, **calls: Call) -> None:
    CALLS.update({f"{subject}: {name.replace('_', ' ')}": call for name, call in calls.items()})


# Last layer.

H, Z, W = torch.ones(4, 3), torch.ones(4, 5), torch.ones(5, 3)

for _name, _call in {
    "contrast_sqnorm": fastgrad.contrast_sqnorm,
    "target_sqnorm": functools.partial(fastgrad.target_sqnorm, target="ones"),
    "contrast_rows": fastgrad.contrast_rows,
}.items():
    _add(
        _name,
        no_tensor=lambda _, f=_call: f([1.0], Z),
        integer_features=lambda _, f=_call: f(H.long(), Z),
        complex_logits=lambda _, f=_call: f(H, Z.to(torch.complex64)),
        scalar_features=lambda _, f=_call: f(torch.tensor(1.0), Z),
        no_class=lambda _, f=_call: f(H, Z[:, :0]),
        leading_shapes=lambda _, f=_call: f(H, Z[:3]),
        float64_beside_float32=lambda _, f=_call: f(H.double(), Z),
        other_device=lambda _, f=_call: f(H.to("meta"), Z),
        loss=lambda _, f=_call: f(H, Z, loss="hinge"),
    )

_add(
    "contrast_sqnorm",
    reduction=lambda _: fastgrad.contrast_sqnorm(H, Z, reduction="none"),
    bias=lambda _: fastgrad.contrast_sqnorm(H, Z, bias=1),  # type: ignore[arg-type]
    log=lambda _: fastgrad.contrast_sqnorm(H, Z, log="yes"),  # type: ignore[arg-type]
    impl=lambda _: fastgrad.contrast_sqnorm(H, Z, impl="cuda"),
    triton_in_float64=lambda _: fastgrad.contrast_sqnorm(H.double(), Z.double(), impl="triton"),
)
_add(
    "target_sqnorm",
    name=lambda _: fastgrad.target_sqnorm(H, Z, "zeros"),
    target_type=lambda _: fastgrad.target_sqnorm(H, Z, 3),  # type: ignore[arg-type]
    boolean=lambda _: fastgrad.target_sqnorm(H, Z, torch.ones(4, dtype=torch.bool)),
    index_shape=lambda _: fastgrad.target_sqnorm(H, Z, torch.ones(3, dtype=torch.long)),
    index_too_large=lambda _: fastgrad.target_sqnorm(H, Z, torch.tensor([0, 1, 5, 2])),
    index_negative=lambda _: fastgrad.target_sqnorm(H, Z, torch.tensor([0, -1, 4, 2])),
    soft_shape=lambda _: fastgrad.target_sqnorm(H, Z, torch.ones(4, 4)),
)
for _name, _call in {
    "linear_contrast_sqnorm": fastgrad.linear_contrast_sqnorm,
    "linear_contrast_stats": fastgrad.linear_contrast_stats,
}.items():
    _add(
        _name,
        no_tensor=lambda _, f=_call: f(None, W),
        scalar_features=lambda _, f=_call: f(torch.tensor(1.0), W),
        weight_width=lambda _, f=_call: f(H, W[:, :2]),
        weight_dtype=lambda _, f=_call: f(H, W.half()),
        weight_device=lambda _, f=_call: f(H, W.to("meta")),
        bias_shape=lambda _, f=_call: f(H, W, torch.ones(4)),
        bias_dtype=lambda _, f=_call: f(H, W, torch.ones(5).half()),
        loss=lambda _, f=_call: f(H, W, loss="hinge"),
        reduction=lambda _, f=_call: f(H, W, reduction="max"),
        impl=lambda _, f=_call: f(H, W, impl="fast"),
    )
_add("contrast_rows", rows=lambda _: fastgrad.contrast_rows(H, Z, rows="all"))
_add(
    "contrast_rows_linear",
    weight_width=lambda _: fastgrad.contrast_rows_linear(H, Z, torch.ones(2, 14)),
    weight_integer=lambda _: fastgrad.contrast_rows_linear(H, Z, torch.ones(2, 15).long()),
    bias_shape=lambda _: fastgrad.contrast_rows_linear(H, Z, torch.ones(2, 15), torch.ones(3)),
    leading_shapes=lambda _: fastgrad.contrast_rows_linear(H[:2], Z, torch.ones(2, 15)),
    loss=lambda _: fastgrad.contrast_rows_linear(H, Z, torch.ones(2, 15), loss="hinge"),
)


# Whole network.


class _Network(nn.Module):
    """Convolution, pooling, linear: as small as a classifier of images gets."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


class _Returns(nn.Module):
    """A network that makes ``make`` of its logits."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = _Network(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.inner(x))


def _images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


NET = _Network().eval()
_features = fastgrad.GradientFeatures

_add(
    "GradientFeatures",
    no_module=lambda _: _features(lambda x: x),  # type: ignore[arg-type]
    script_module=lambda _: _features(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
    loss=lambda _: _features(NET, loss="hinge"),
    target=lambda _: _features(NET, target="zeros"),
    target_type=lambda _: _features(NET, target=0.5),  # type: ignore[arg-type]
    reduction=lambda _: _features(NET, reduction="none"),
    impl=lambda _: _features(NET, impl="fast"),
    log=lambda _: _features(NET, log=1),  # type: ignore[arg-type]
    empty_signals=lambda _: _features(NET, signals=[]),
    malformed_signals=lambda _: _features(NET, signals=["bce"]),  # type: ignore[list-item]
    loss_of_a_signal=lambda _: _features(NET, signals=[("hinge", "ones")]),
    contrast_among_signals=lambda _: _features(NET, signals=[("bce", "contrast")]),
    layers=lambda _: _features(NET, layers="features"),
    chunk_size=lambda _: _features(NET, chunk_size=0),
    memory_budget=lambda _: _features(NET, memory_budget=1.5),  # type: ignore[arg-type]
    no_parameters=lambda _: _features(nn.ReLU()),
    batch_statistics=lambda _: _features(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    ),
    report_before_a_call=lambda _: _features(NET).report(),
    trace_of_one_sample=lambda _: _features(NET).trace(_images(1)),
    no_batch=lambda _: _features(NET)(),
    no_logits=lambda _: _features(_Returns(lambda z: "text"))(_images()),
    logits_of_three_dimensions=lambda _: _features(_Returns(lambda z: z[None]))(_images()),
    integer_logits=lambda _: _features(_Returns(lambda z: z.long()))(_images()),
    samples_mixed=lambda _: _features(_Returns(lambda z: z - z.mean(0)))(_images()),
)
_add("logits_of", no_tensor=lambda _: logits_of({"scores": Z}))


def _recorded(use: Callable[[nn.Module, Tensor], Any], model: nn.Module = NET) -> Any:
    with fastgrad.record(model):
        return use(model, model(_images()).sum())


def _twice() -> Any:
    with fastgrad.record(NET):
        return fastgrad.grad_sqnorm((NET(_images()) + NET(_images())).sum(), list(NET.parameters()))


def _training(model: nn.Module) -> Any:
    with fastgrad.record(model.train()):
        return model(torch.ones(4, 3))


_add(
    "record",
    no_module=lambda _: fastgrad.record("model"),  # type: ignore[arg-type]
    compiled=lambda _: fastgrad.record(torch.compile(_Network())),
    batch_norm_in_training=lambda _: _training(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))),
)
_add(
    "grad_sqnorm",
    outside=lambda _: fastgrad.grad_sqnorm(torch.ones(()), list(NET.parameters())),
    foreign_parameter=lambda _: _recorded(lambda m, s: fastgrad.grad_sqnorm(s, nn.Parameter(torch.ones(2)))),
    no_gradients=lambda _: _recorded(lambda m, s: fastgrad.grad_sqnorm(s.detach(), list(m.parameters()))),
    no_grad_outputs=lambda _: _recorded(
        lambda m, s: fastgrad.grad_sqnorm(s, list(m.parameters()), is_grads_batched=True)
    ),
    called_twice=lambda _: _twice(),
)


def _rule(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    return {}


_add(
    "register_rule",
    no_type=lambda _: register_rule()(_rule),
    no_module_type=lambda _: register_rule(int)(_rule),  # type: ignore[arg-type]
    instance=lambda _: register_rule(nn.Linear(1, 1))(_rule),  # type: ignore[arg-type]
)


# Estimators.

_random = np.random.default_rng(0)
ROWS = _random.random((60, 6))
_detector = fastgrad.UncertaintyDetector
_classifier = fastgrad.IntrospectiveClassifier


@functools.cache
def _fitted_detector() -> Any:
    return _detector(components=1).fit(ROWS)


@functools.cache
def _fitted_classifier() -> Any:
    return _classifier(hidden=(4,), max_epochs=1).fit(ROWS, np.arange(60) % 3)


for _name, _value in {
    "contrasts": "maybe", "log": 1, "guard": None, "supervised": "forest", "combine": "sum", "hidden": 0,
    "members": 1.5, "components": 0, "dimensions": -1, "neighbours": 0, "cap": 0.0, "calibration_fraction": 1.0,
    "trust": "blind", "false_alarm_rate": 0.0,
}.items():  # fmt: skip
    _add(
        "UncertaintyDetector",
        **{_name: lambda _, name=_name, value=_value: _detector(**{name: value}).fit(ROWS)},
    )

_add(
    "UncertaintyDetector",
    unknown_block=lambda _: _detector().fit({"pixels": ROWS}),
    no_block=lambda _: _detector().fit({}),
    block_of_wrong_rank=lambda _: _detector().fit({"logits": ROWS[:, 0]}),
    blocks_of_other_lengths=lambda _: _detector().fit({"logits": ROWS, "features": ROWS[:9]}),
    nan_in_a_block=lambda _: _detector().fit({"logits": np.full((9, 2), np.nan)}),
    contrasts_unlike_logits=lambda _: _detector().fit({"logits": ROWS, "contrasts": ROWS[:, :4]}),
    negative_norms=lambda _: _detector().fit({"gradients": -ROWS}),
    empty_tensor=lambda _: _detector().fit(np.ones((0, 2, 3))),
    label_count=lambda _: _detector().fit(ROWS, np.zeros(9)),
    labels_of_an_outlier_detector=lambda _: _detector().fit(ROWS, np.where(ROWS[:, 0] > 0.5, 1, -1)),
    labels_not_finite=lambda _: _detector().fit(ROWS, np.full(60, np.nan)),
    three_labels=lambda _: _detector().fit(ROWS, np.arange(60) % 3),
    kind_count=lambda _: _detector().fit(ROWS, np.arange(60) % 2, kinds=np.zeros(9)),
    few_clean_samples=lambda _: _detector().fit(ROWS[:3]),
    held_out_shape=lambda _: _detector().fit(ROWS, held_out=np.zeros(9, bool)),
    nothing_held_out=lambda _: _detector().fit(ROWS, held_out=np.zeros(60, bool)),
    not_fitted=lambda _: _detector().decision_function(ROWS),
    other_blocks_than_in_fit=lambda _: _fitted_detector().decision_function({"logits": ROWS}),
    threshold_of_a_rate=lambda _: _fitted_detector().threshold(2),
    score_label_count=lambda _: _fitted_detector().score(ROWS, [0, 1]),
)
for _name, _value in {
    "activation": "gelu", "loss": "hinge", "batch_size": 0, "max_epochs": 0, "patience": 1.5, "hidden": (8, 0),
    "validation_fraction": 1.0,
}.items():  # fmt: skip
    _add(
        "IntrospectiveClassifier",
        **{
            _name: lambda _, name=_name, value=_value: _classifier(**{name: value}).fit(
                ROWS, np.arange(60) % 3
            )
        },
    )
_add(
    "IntrospectiveClassifier",
    no_labels=lambda _: _classifier().fit(ROWS, None),  # type: ignore[arg-type]
    label_count=lambda _: _classifier().fit(ROWS, np.zeros(9)),
    labels_not_finite=lambda _: _classifier().fit(ROWS, np.full(60, np.inf)),
    features_alone=lambda _: _classifier().fit({"features": ROWS}, np.arange(60) % 3),
    features_of_three_dimensions=lambda _: _classifier().fit({"features": ROWS[None], "logits": ROWS}, [0]),
    empty_rows=lambda _: _classifier().fit(np.ones((0, 2, 3)), []),
    other_shape_than_in_fit=lambda _: _fitted_classifier().predict(np.ones((2, 5, 3))),
    not_fitted=lambda _: _classifier().predict(ROWS),
    loader_is_an_iterator=lambda _: _classifier().fit_loader(iter([])),
    loader_is_empty=lambda _: _classifier().fit_loader([]),
    loader_of_three_parts=lambda _: _classifier().fit_loader([((Z, Z, Z), torch.zeros(4).long())]),
    loader_with_float_labels=lambda _: _classifier().fit_loader([(Z, torch.zeros(4))]),
    loader_not_finite=lambda _: _classifier().fit_loader([(Z / 0, torch.zeros(4).long())]),
    unknown_label_in_validation=lambda _: _classifier(max_epochs=1).fit_loader(
        [(Z, torch.arange(4) % 2)], [(Z, torch.arange(4))]
    ),
)


# Two-stage model.

_two_stage = fastgrad.TwoStageModel


def _loader(x: Tensor, labels: Tensor | None = None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x) if labels is None else TensorDataset(x, labels), batch_size=32)


@functools.cache
def _fitted_two_stage() -> Any:
    return _two_stage(_Network().eval()).fit(_loader(_images(60)), challenge_loader=())


def _saved(folder: Path) -> Path:
    path = folder / "detector.safetensors"
    _fitted_two_stage().save(path)
    return path


def _foreign(folder: Path) -> Path:
    (folder / "foreign.safetensors").write_bytes(b"no such thing")
    return folder / "foreign.safetensors"


def _damaged(folder: Path) -> Path:
    path = _saved(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


class _TextNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.fc(self.embedding(input_ids).mean(1))


_add(
    "TwoStageModel",
    no_module=lambda _: _two_stage("resnet18"),  # type: ignore[arg-type]
    detector=lambda _: _two_stage(NET, detector="default"),  # type: ignore[arg-type]
    classifier=lambda _: _two_stage(NET, classifier=_detector()),  # type: ignore[arg-type]
    gradients=lambda _: _two_stage(NET, gradients="all"),
    not_fitted=lambda _: _two_stage(NET)(_images()),
    threshold_before_fit=lambda _: _two_stage(NET).threshold(),
    save_before_fit=lambda folder: _two_stage(NET).save(folder / "detector.safetensors"),
    max_samples=lambda _: _two_stage(NET).fit(_loader(_images()), max_samples=3),
    empty_loader=lambda _: _two_stage(NET).fit([]),
    empty_calibration_loader=lambda _: _two_stage(NET).fit(
        _loader(_images(60)), challenge_loader=(), calibration_loader=[]
    ),
    loader_of_text=lambda _: _two_stage(NET).fit(["image"]),
    challenges_from_tokens=lambda _: _two_stage(_TextNetwork().eval()).fit(
        [{"input_ids": torch.ones(60, 3, dtype=torch.long)}]
    ),
    classifier_without_labels=lambda _: _two_stage(NET, classifier=_classifier()).fit(
        [_images(60)], challenge_loader=()
    ),
    classifier_without_a_class=lambda _: _two_stage(NET, classifier=_classifier()).fit(
        _loader(_images(60), torch.arange(60) % 3), challenge_loader=()
    ),
    few_clean_samples=lambda _: _two_stage(NET).fit([_images(3)], ()),
    logits_of_three_dimensions=lambda _: _two_stage(_Returns(lambda z: z[None])).fit([_images(60)], ()),
    no_logits=lambda _: _two_stage(_Returns(lambda z: "text")).fit([_images(60)], ()),
    threshold_of_a_rate=lambda _: _fitted_two_stage().threshold(1.5),
    load_a_missing_file=lambda folder: _two_stage.load(folder / "none.safetensors", NET),
    load_a_foreign_file=lambda folder: _two_stage.load(_foreign(folder), NET),
    load_a_damaged_file=lambda folder: _two_stage.load(_damaged(folder), NET),
    load_with_another_network=lambda folder: _two_stage.load(_saved(folder), _Network(5)),
    load_without_a_network=lambda folder: _two_stage.load(_saved(folder), None),  # type: ignore[arg-type]
)


# Export and what reads its files.


class _Triple(nn.Module):
    """A module of the three outputs that export asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.fc(x.flatten(1)[:, :4])
        return z, z.softmax(1), z.amax(1)


TRIPLE = _Triple().eval()
IMAGE = torch.ones(1, 3, 8, 8)

_add(
    "export",
    no_module=lambda folder: export(lambda x: x, IMAGE, folder / "m.pt2"),  # type: ignore[arg-type]
    no_tensor=lambda folder: export(TRIPLE, [1.0], folder / "m.pt2"),  # type: ignore[arg-type]
    integer_example=lambda folder: export(TRIPLE, IMAGE.long(), folder / "m.pt2"),
    empty_example=lambda folder: export(TRIPLE, IMAGE[:0], folder / "m.pt2"),
    suffix=lambda folder: export(TRIPLE, IMAGE, folder / "m.bin"),
    no_folder=lambda folder: export(TRIPLE, IMAGE, folder / "none" / "m.pt2"),
    max_batch=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", max_batch=0),
    false_alarm_rate=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", false_alarm_rate=1),
    mean_length=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", mean=[0.5]),
    std_not_finite=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", std=[1, 1, float("nan")]),
    std_not_positive=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", std=[1, 1, 0]),
    mean_without_images=lambda folder: export(TRIPLE, torch.ones(1, 9), folder / "m.pt2", mean=[0.5]),
    two_outputs=lambda folder: export(_Returns(lambda z: (z, z)).eval(), IMAGE, folder / "m.pt2"),
    label_count=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", labels=["cat"]),
    few_scores=lambda folder: export(TRIPLE, IMAGE, folder / "m.pt2", scores=np.ones(3)),
)


def _archive(folder: Path, content: str | None) -> Path:
    path = folder / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/version", "1")
        if content is not None:
            archive.writestr("model/extra/fastgrad.json", content)
    return path


DESCRIPTION = Description((3, 8, 8), "float32", 4, 8, "cpu", threshold=1.0, false_alarm_rate=0.05)


def _described(folder: Path) -> Path:
    path = _archive(folder, None)
    write_description(path, DESCRIPTION)
    return path


_add(
    "ModelPackage",
    missing=lambda folder: ModelPackage(folder / "none.pt2"),
    no_archive=lambda folder: ModelPackage(_foreign(folder)),
    no_description=lambda folder: ModelPackage(_archive(folder, None)),
    other_format=lambda folder: read_description(_archive(folder, json.dumps({"format": 99}))),
    damaged_description=lambda folder: read_description(_archive(folder, json.dumps({"format": 1}))),
    rate_not_in_the_file=lambda _: DESCRIPTION.threshold_at(0.3),
)
_add(
    "decode_image",
    empty=lambda _: decode_image(b"", DESCRIPTION),
    no_image=lambda _: decode_image(b"GIF99", DESCRIPTION),
    model_without_images=lambda _: decode_image(b"", Description((9,), "float32", 4, 8, "cpu")),
)
_add(
    "score",
    batch=lambda folder: score(_described(folder), folder, folder / "out.parquet", batch=0),
    no_folder=lambda folder: score(_described(folder), folder, folder / "none" / "out.parquet"),
    no_model=lambda folder: score(folder / "none.pt2", folder, folder / "out.parquet"),
)
_add(
    "create_app",
    missing=lambda folder: create_app(str(folder / "none.pt2")),
    rate_not_in_the_file=lambda folder: create_app(str(_described(folder)), false_alarm_rate=0.3),
    empty_key=lambda folder: create_app(str(_described(folder)), api_key=""),
)


# Challenges, metrics, figures, drift.

_generate = challenges.generate_challenges
_add(
    "challenges",
    severity=lambda _: challenges.challenge_names(severities=[4]),
    names_as_a_string=lambda _: challenges.challenge_names("noise"),
    name=lambda _: challenges.challenge_names(["rain"]),
    full_name=lambda _: challenges.challenge_names(["noise-4"]),
    no_module=lambda _: _generate("net", _images()),  # type: ignore[arg-type]
    attack_without_a_model=lambda _: _generate(None, _images(), names=["fgsm"]),
    batch_size=lambda _: _generate(None, _images(), names=["noise"], batch_size=0),
    three_dimensions=lambda _: _generate(None, _images()[0], names=["noise"]),
    integer_images=lambda _: _generate(None, _images().byte(), names=["noise"]),
    not_finite=lambda _: _generate(None, _images() / 0, names=["noise"]),
    clip=lambda _: _generate(None, _images(), names=["noise"], clip=(1, 0)),
    mean_alone=lambda _: _generate(None, _images(), names=["noise"], mean=[0.5] * 3),
    mean_length=lambda _: _generate(None, _images(), names=["noise"], mean=[0.5], std=[1.0]),
    std=lambda _: _generate(None, _images(), names=["noise"], mean=[0.5] * 3, std=[1.0, 1.0, 0.0]),
    logits_of_three_dimensions=lambda _: _generate(_Returns(lambda z: z[None]), _images(), names=["fgsm"]),
)
GOOD = [0.1, 0.2, 0.3]
for _name in ("auroc", "aupr", "fpr_at_tpr", "detection_accuracy", "detection_report"):
    _call = getattr(metrics, _name)
    _add(
        f"metrics.{_name}",
        empty=lambda _, f=_call: f([], GOOD),
        two_dimensions=lambda _, f=_call: f(GOOD, [GOOD]),
        not_finite=lambda _, f=_call: f(GOOD, [np.nan]),
    )
_add("metrics.fpr_at_tpr", rate=lambda _: metrics.fpr_at_tpr(GOOD, GOOD, 1.5))
P = np.full((4, 2), 0.5)
for _name in ("reliability", "ece", "mce", "brier", "nll", "calibration_report"):
    _call = getattr(metrics, _name)
    _add(
        f"metrics.{_name}",
        one_dimension=lambda _, f=_call: f(P[:, 0], [0, 1, 0, 1]),
        label_count=lambda _, f=_call: f(P, [0, 1]),
        no_probability=lambda _, f=_call: f(3 * P, [0, 1, 0, 1]),
        no_index=lambda _, f=_call: f(P, [0, 1, 0, 2]),
    )
_add("metrics.reliability", bins=lambda _: metrics.reliability(P, [0, 1, 0, 1], bins=0))
_add(
    "threshold_for",
    cost=lambda _: metrics.threshold_for(GOOD, [0, 1, 0], cost_of_error=0, cost_of_review=1),
    lengths=lambda _: metrics.threshold_for(GOOD, [0, 1], cost_of_error=2, cost_of_review=1),
    negative_error=lambda _: metrics.threshold_for(GOOD, [0, 1, -1], cost_of_error=2, cost_of_review=1),
)
_add(
    "plots",
    no_scores=lambda _: plots.score_histograms({}),
    reference=lambda _: plots.score_histograms({"clean": GOOD}, reference="noise"),
    layer_norms_width=lambda _: plots.layer_norms({"clean": np.ones((2, 3))}, ["a", "b"]),
    manifold_points=lambda _: plots.manifold(lambda p: p, torch.ones(3, 3), torch.ones(3)),
    sparsity_of_nothing=lambda _: plots.contrast_sparsity({"before": np.zeros((2, 3))}),
)
_add(
    "ScoreReference",
    edges_that_fall=lambda _: ScoreReference(np.array([2.0, 1.0]), np.ones(3)),
    count_of_counts=lambda _: ScoreReference(np.array([1.0, 2.0]), np.ones(2)),
    few_scores=lambda _: ScoreReference.from_scores(GOOD),
    bins=lambda _: ScoreReference.from_scores(np.arange(40.0), bins=1),
    not_finite=lambda _: ScoreReference.from_scores([np.inf] * 40),
    two_dimensions=lambda _: ScoreReference.from_scores(np.ones((40, 2))),
)
_add(
    "DriftMonitor",
    false_alarm_rate=lambda _: DriftMonitor(np.arange(40.0), false_alarm_rate=0),
    form=lambda _: DriftMonitor(np.arange(40.0), form="never"),  # type: ignore[arg-type]
    not_finite=lambda _: DriftMonitor(np.arange(40.0)).update([1.0, np.nan]),
)
_add(
    "as_pytorch_ood", predict_before_fit=lambda _: interop.as_pytorch_ood(_two_stage(NET)).predict(_images())
)


# Commands.

_add(
    "fastgrad",
    no_command=lambda _: main([]),
    unknown_command=lambda _: main(["dance"]),
    demo_epochs=lambda folder: main(["demo", "--out", str(folder), "--epochs", "0"]),
    demo_words=lambda folder: main(["demo", "--epochs", "many"]),
    serve_without_a_model=lambda _: main(["serve"]),
    serve_missing=lambda folder: main(["serve", str(folder / "none.pt2")]),
    serve_workers=lambda folder: main(["serve", str(folder / "m.pt2"), "--workers", "0"]),
    serve_timeout=lambda folder: main(["serve", str(folder / "m.pt2"), "--timeout", "0"]),
    serve_empty_key=lambda folder: main(["serve", str(_described(folder)), "--api-key-file", os.devnull]),
    serve_rate=lambda folder: main(["serve", str(_described(folder)), "--false-alarm-rate", "0.3"]),
    score_without_out=lambda folder: main(["score", str(folder / "m.pt2"), str(folder)]),
    score_missing=lambda folder: main(
        ["score", str(folder / "none.pt2"), str(folder), "--out", str(folder / "o.parquet")]
    ),
)


def run(path: Path) -> None:
    """Write the outcomes of all calls to ``path``."""
    found = {}
    for name, call in CALLS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = outcome(call, Path(folder))
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
