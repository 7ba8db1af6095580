"""The exported file, read back: a ``.pt2`` archive or an ``.onnx`` that carries its own description.

`fastgrad.deploy.file.onnx_file` says what is in an ``.onnx``.

A ``.pt2`` is a zip. Beside the compiled graph it holds one JSON member, ``<name>/extra/fastgrad.json``, so
the description can be read by anything that reads zips::

    import json, zipfile
    with zipfile.ZipFile("model.pt2") as archive:
        member = next(name for name in archive.namelist() if name.endswith("/extra/fastgrad.json"))
        description = json.loads(archive.read(member))

and the graph runs without this package::

    import torch
    model = torch._inductor.aoti_load_package("model.pt2")
    logits, probabilities, uncertainty = model(x)     # x (B, *input shape), normalized with mean and std

A file exported with ``evidence=True`` gives a fourth, the evidence ``(B, E)``, its columns named in the description.
There ``x`` must have the dtype and shape of the description and be contiguous (``x.contiguous()``): native code
reads memory as it is and checks nothing. `ModelPackage` checks all that. The graph is native code: load only files
that you would also run as programs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgrad._torch import load_package
from fastgrad.deploy.drift import ScoreReference
from fastgrad.deploy.file import onnx_file
from fastgrad.engine.memory import keep_freed_memory

MEMBER = "extra/fastgrad.json"
#: Of the description; 2 for a file whose graph gives the evidence as well, which no reader of 1 expects.
FORMATS = (1, 2)
#: What reading a damaged archive raises.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
#: Of the kinds of file, as their names end.
SUFFIXES = (".pt2", ".onnx")


class PackageError(ValueError):
    """The file is not an exported fastgrad model, or is one that this machine cannot run."""


class Prediction(NamedTuple):
    """What the network says, and how far to trust it.

    Attributes:
        logits: ``(B, N)``.
        probabilities: ``(B, N)``, of the introspective classifier where there is one, else the softmax.
        uncertainty: ``(B,)``, higher = less reliable.
    """

    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor


@dataclass(frozen=True)
class Description:
    """What travels with the graph.

    Attributes:
        input_shape: shape of one input, without the batch.
        input_dtype: ``"float32"`` and the like.
        classes: N.
        max_batch: largest batch the graph was exported for.
        device: type of the device it was compiled for, ``"cpu"`` or ``"cuda"``.
        labels: N names, or None.
        mean, std: per channel, in units of a pixel from 0 to 1; the input is ``(pixel - mean) / std``.
        false_alarm_rate: the rate that ``threshold`` belongs to.
        threshold: an input is called unreliable when its uncertainty exceeds it; None without calibration.
        thresholds: further pairs of rate and threshold.
        histogram: in-distribution scores in bins of equal width: ``{"edges": (K+1), "counts": (K)}``, or
            None.
        reference: the same scores as the drift monitor reads them: ``{"edges": (K-1), "counts": (K)}``, or
            None.
        versions: of fastgrad and torch, and the processor's instruction set the graph was compiled for.
        evidence: of a file that gives the evidence: names in the order of its columns, and in plain words what an
            alarm means that they raise; else None.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    classes: int
    max_batch: int
    device: str
    labels: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    false_alarm_rate: float | None = None
    threshold: float | None = None
    thresholds: list[tuple[float, float]] = field(default_factory=list)
    histogram: dict[str, list[float]] | None = None
    reference: dict[str, list[float]] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] | None = None

    def threshold_at(self, rate: float | None) -> float | None:
        """The threshold at a false-alarm rate, one of those in the file (None: the file's own).

        Raises:
            ValueError: the file holds no threshold for this rate.
        """
        if rate is None or rate == self.false_alarm_rate:
            return self.threshold
        for known, threshold in self.thresholds:
            if abs(known - rate) < 1e-12:
                return threshold
        known_rates = ", ".join(f"{known:g}" for known, _ in self.thresholds) or "none"
        raise ValueError(
            "false_alarm_rate must be one for which the file holds a threshold "
            f"({known_rates}); it was {rate!r}"
        )

    def score_reference(self) -> ScoreReference | None:
        """The in-distribution scores for a `DriftMonitor`."""
        if self.reference is None:
            return None
        return ScoreReference(np.array(self.reference["edges"]), np.array(self.reference["counts"]))

    def normalize(self, pixels: Tensor) -> Tensor:
        """``(pixel - mean) / std`` for pixels ``(..., C, H, W)`` from 0 to 1; the identity without either."""
        if self.mean is not None:
            pixels = pixels - torch.tensor(self.mean, dtype=pixels.dtype).view(-1, 1, 1)
        if self.std is not None:
            pixels = pixels / torch.tensor(self.std, dtype=pixels.dtype).view(-1, 1, 1)
        return pixels


def description_text(description: Description) -> str:
    """As it stands in the file, JSON."""
    content = asdict(description)
    if description.evidence is None:
        del content["evidence"]
    return json.dumps({"format": FORMATS[description.evidence is not None], **content})


def write_description(path: str | os.PathLike[str], description: Description) -> None:
    """Add the description to a finished ``.pt2``."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/", 1)[0]
        archive.writestr(f"{root}/{MEMBER}", description_text(description))


def read_description(path: str | os.PathLike[str]) -> Description:
    """Read what travels with the graph, without loading the graph.

    Raises:
        PackageError: no such file, one of neither kind, no description inside, or one of a newer format.
        MissingExtraError: an ``.onnx`` needs ``pip install 'fastgrad[onnx]'``.
    """
    if not Path(path).is_file():
        raise PackageError(f"{path}: there is no such file")
    onnx = Path(path).suffix == ".onnx"
    try:
        text = onnx_file.read_metadata(path) if onnx else _read_member(path)
        if text is None:
            raise PackageError(f"{path} was not written by fastgrad.export: it holds no {MEMBER}")
        content = json.loads(text)
    except (*DAMAGED, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackageError(
            f"{path} is not a readable {'.onnx' if onnx else '.pt2 archive'}: {error}"
        ) from None
    if not isinstance(content, dict) or content.pop("format", None) not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise PackageError(f"{path} has another format than {known}; a newer fastgrad may read it")
    try:
        content["input_shape"] = tuple(content["input_shape"])
        content["thresholds"] = [(float(a), float(b)) for a, b in content["thresholds"]]
        return Description(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(f"{path}: the description inside is damaged: {error}") from None


def _read_member(path: str | os.PathLike[str]) -> bytes | None:
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if name.endswith("/" + MEMBER)), None)
        return None if member is None else archive.read(member)


def _load_archive(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """The function in a ``.pt2``; PyTorch would run code of which a bit is another."""
    with zipfile.ZipFile(path) as archive:
        member = archive.testzip()
    if member is not None:
        raise RuntimeError(f"it is damaged: {member} is not what was written")
    return load_package(path)


class ModelPackage:
    """An exported model, loaded.

    Args:
        path: the ``.pt2``, or the ``.onnx``, which runs on the CPU.

    Raises:
        PackageError: not an exported model, a damaged one, or one compiled for a device that is not here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.description = read_description(path)
        if self.description.device == "cuda" and not torch.cuda.is_available():
            raise PackageError(f"{path} was compiled for a CUDA device; there is none here")
        # Else a process that only runs files clears pages for half of a small network's time.
        keep_freed_memory()
        try:
            load = onnx_file.load if self.path.suffix == ".onnx" else _load_archive
            self._run: Callable[[Tensor], Sequence[Tensor]] = load(self.path)
        except DAMAGED as error:
            raise PackageError(f"{path} cannot be loaded: {str(error).partition(chr(10))[0]}") from error

    def __call__(self, x: Tensor) -> Prediction:
        """Run a batch ``(B, *input_shape)``, already normalized, ``1 <= B <= max_batch``.

        Raises:
            ValueError: a wrong shape or batch size.
            TypeError: a wrong dtype.
        """
        return self.explain(x)[0]

    def explain(self, x: Tensor) -> tuple[Prediction, dict[str, Tensor]]:
        """Run a batch, and say what makes it unusual: the evidence ``(B,)`` by name, as `TwoStageModel.explain` does.

        Without evidence in the file there is none, an empty dictionary.

        Raises:
            ValueError: a wrong shape or batch size.
            TypeError: a wrong dtype.
        """
        expected = self.description.input_shape
        if tuple(x.shape[1:]) != expected or not 1 <= len(x) <= self.description.max_batch:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, expected))}) with 1 <= B <= "
                f"{self.description.max_batch}; it was {tuple(x.shape)}"
            )
        if str(x.dtype) != f"torch.{self.description.input_dtype}":
            raise TypeError(f"x must have dtype {self.description.input_dtype}; it was {x.dtype}")
        x = x.to(self.description.device).contiguous()
        logits, probabilities, uncertainty, *evidence = self._run(x)
        columns = evidence[0].unbind(-1) if evidence else ()
        named = dict(zip(self.description.evidence or (), columns, strict=True))
        return Prediction(logits, probabilities, uncertainty), named


def replace_atomically(make: Any, path: str | os.PathLike[str]) -> None:
    """Call ``make(temporary_path)`` and move what it wrote to ``path``: never a half-written file."""
    target = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / target.name
        make(temporary)
        # A copy into the target's own folder first: a rename across file systems is not atomic.
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copyfile(temporary, beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
