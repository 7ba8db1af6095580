"""A small model, its exported file and files of none, for the tests of the outer rooms."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from python_process import run_python
from torch import Tensor, nn

from fastgrad.deploy.file.package import Description, write_description


class Out(NamedTuple):
    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor


class TinyTwoStage(nn.Module):
    """A network whose uncertainty is its first layer's log gradient norm, by autograd in ``forward``."""

    def __init__(self, channels: int = 3, size: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        self.first = nn.Linear(channels * size * size, 8)
        self.last = nn.Linear(8, classes)
        self.requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        self.register_buffer("calibration_scores", self(torch.randn(200, *self.shape, generator=generator))[2])

    def forward(self, x: Tensor) -> Out:
        with torch.enable_grad():
            flat = x.flatten(1)
            hidden = self.first(flat).requires_grad_()
            logits = self.last(torch.tanh(hidden))
            (gradient,) = torch.autograd.grad(logits, hidden, torch.sigmoid(logits.detach()) - 1)
        logits = logits.detach()
        norms = gradient.square().sum(1) * (flat.square().sum(1) + 1)
        return Out(logits, logits.softmax(1), norms.clamp_min(1e-30).log())

    alarms = {"norm": "a first layer that would have to change much", "size": "large pixels"}  # noqa: RUF012

    def explain(self, x: Tensor) -> tuple[Out, dict[str, Tensor]]:
        found = self(x)
        return found, {"norm": found.uncertainty.clamp_min(0), "size": x.flatten(1).abs().amax(1)}

    def threshold(self, false_alarm_rate: float) -> float:
        scores = self.calibration_scores
        assert isinstance(scores, Tensor)
        return float(torch.quantile(scores, 1 - false_alarm_rate))


def export_tiny(folder: Path, name: str) -> Path:
    """Export `TinyTwoStage` to a folder of all processes, in the first that asks; `watched_export` says how.

    Compiling takes many seconds: all tests, those of the documentation's pages too, share one ``tiny.pt2``.
    """
    path = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            (temporary := folder / f"temporary{path.suffix}").mkdir()
            dropped = ("TORCHINDUCTOR_CACHE_DIR", "ORT_DISABLE_TELEMETRY")
            kept = {name: value for name, value in os.environ.items() if name not in dropped}
            kept |= {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
            # What is compiled is a test's: it need not be fast.
            run_python("-m", "watched_export", path, env={**kept, "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"})
    return path


def write_tiny(path: Path) -> None:
    """Export `TinyTwoStage` with its evidence."""
    from fastgrad.deploy.file.export import export

    export(
        TinyTwoStage(),
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        path,
        labels={"cat": 0, "dog": 1, "cow": 2, "hen": 3}.keys(),  # type: ignore[arg-type]  # as of torchvision's class_to_idx
        mean=[0.5] * 3,
        std=[0.25] * 3,
        max_batch=64,
        evidence=True,
    )


def write_archive(path: Path, description: Description | None, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    """Write a .pt2 that holds these members and no model."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/version", "1")
        for name, content in members:
            file.writestr(name, content)
    if description is not None:
        write_description(path, description)
    return path
