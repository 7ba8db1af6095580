"""The exported file, read back: a ``.pt2`` archive or an ``.onnx``, with its description.

A ``.pt2`` is a zip archive whose member ``<name>/extra/fastgrad.json`` is the description. The graph runs without this
package, by ``torch._inductor.aoti_load_package("model.pt2")(x)``, and returns what `outputs_of` names. Native code does
not check its input; `ModelPackage` checks dtype and shape. Load only files that you would also run as programs.
`fastgrad.deploy.file.onnx_file` describes an ``.onnx``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import X86, load_package
from fastgrad.deploy.file import onnx_file
from fastgrad.deploy.file.description import DTYPES, FORMAT, description_text, outputs_of
from fastgrad.deploy.file.description import Description as Description
from fastgrad.deploy.file.opening import without_waiting
from fastgrad.memory import keep_freed_memory
from fastgrad.prediction import Prediction

MEMBER = "extra/fastgrad.json"
#: Most bytes of the description, and of an archive's table of contents.
_LARGEST = 4 * 2**20
#: Errors of reading a damaged archive.
DAMAGED = (zipfile.BadZipFile, EOFError, RuntimeError, UnicodeDecodeError, AssertionError)
#: Suffixes of the kinds of file.
SUFFIXES = (".pt2", ".onnx")


class PackageError(ValueError):
    """The file is not an exported fastgrad model, or this machine cannot run it."""


def write_description(path: str | os.PathLike[str], description: Description) -> None:
    """Add the description to a finished ``.pt2``."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/", 1)[0]
        archive.writestr(f"{root}/{MEMBER}", description_text(description))


def read_description(path: str | os.PathLike[str]) -> Description:
    """Read the description in a file without loading the graph.

    Raises:
        PackageError: There is no such file, it is of neither kind, or its description is missing, damaged or newer.
    """
    checks.is_path(path=path)
    if not Path(path).is_file():
        raise PackageError(f"{path}: there is no such file")
    onnx = Path(path).suffix == ".onnx"
    try:
        text = onnx_file.read_metadata(path) if onnx else _read_member(path)
        if text is not None and len(text) > _LARGEST:
            raise RuntimeError(f"its description must have at most {_LARGEST} bytes")
        content = None if text is None else json.loads(text)
    except (*DAMAGED, OSError, ValueError) as error:
        kind = ".onnx" if onnx else ".pt2 archive"
        raise PackageError(f"{path} is not a readable {kind}: {error}") from None
    if text is None:
        raise PackageError(f"{path} was not written by fastgrad.export: it holds no {MEMBER}")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise PackageError(f"{path} has another format than {FORMAT}; a newer fastgrad may read it")
    try:
        for name, convert in (("input_shape", tuple), ("thresholds", lambda pairs: list(map(tuple, pairs)))):
            if isinstance(content[name], list):
                content[name] = convert(content[name])
        return Description(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(f"{path}: the description inside is damaged: {str(error)[:300]}") from None


class _Bounded(io.FileIO):
    """A file that raises if more than 4 MiB are read at once: an archive's table of contents can claim any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = _LARGEST + 1 if size is None or size < 0 else size
        content = super().read(min(wanted, _LARGEST + 1)) or b""
        if len(content) > _LARGEST:
            raise zipfile.BadZipFile("its table of contents is too large")
        return content


@contextlib.contextmanager
def _archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open a ``.pt2``; refuse compressed or doubled entries, links, and paths outside, which PyTorch never writes."""
    with _Bounded(os.fspath(path), opener=without_waiting) as file, zipfile.ZipFile(file) as archive:
        names = set()
        for entry in archive.infolist():
            name = entry.filename
            if name in names:
                raise RuntimeError(f"it holds {name[:80]!r} twice")
            names.add(name)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise RuntimeError(f"{name[:80]!r} is a link")
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise RuntimeError(f"{name[:80]!r} lies outside the archive")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise RuntimeError(f"{name[:80]!r} is compressed")
        yield archive


def _read_member(path: str | os.PathLike[str]) -> str | None:
    with _archive(path) as archive:
        members = [entry for entry in archive.infolist() if entry.filename.endswith("/" + MEMBER)]
        if not members:
            return None
        if len(members) > 1 or members[0].file_size > _LARGEST:
            raise RuntimeError(f"it must hold one {MEMBER} of at most {_LARGEST} bytes")
        return archive.read(members[0]).decode()


@contextlib.contextmanager
def _named_in_ascii(path: Path) -> Iterator[Path]:
    """Yield the file, or a copy named in ASCII: PyTorch and ONNX Runtime take names for UTF-8, not all systems do."""
    if str(path).isascii():
        yield path
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(shutil.copyfile(path, Path(folder) / f"model{path.suffix}"))


def _load_archive(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return the function in a ``.pt2`` whose checksums are right: PyTorch would run code with a flipped bit."""
    with _archive(path) as archive:
        member = archive.testzip()
    if member is not None:
        raise RuntimeError(f"it is damaged: {member} is not what was written")
    return load_package(path)


def _check_machine(path: str | os.PathLike[str], description: Description) -> None:
    """Refuse native code for another system or processor, which would end this process."""
    made = description.versions.get("system", sys.platform)
    if made != sys.platform:
        raise PackageError(f"{path} was compiled on {made}; this system is {sys.platform}; an .onnx runs on both")
    if description.device != "cpu":
        return
    needed, here = description.versions.get("cpu", "DEFAULT"), torch.backends.cpu.get_cpu_capability()
    known = list(X86)
    if needed not in (known[: known.index(here) + 1] if here in known else ("DEFAULT", here)):
        raise PackageError(f"{path} was compiled for a processor with {needed}; this one has {here}")


class ModelPackage:
    """An exported model, loaded: call it with a batch ``(B, *input_shape)`` for a `Prediction`.

    Args:
        path: The ``.pt2``, or the ``.onnx``, which runs on the CPU.

    Raises:
        PackageError: The file is not an exported model, is damaged, or was compiled for a device that is missing here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.description = read_description(path)
        self.path = Path(path)
        if self.description.device == "cuda" and not torch.cuda.is_available():
            raise PackageError(f"{path} was compiled for a CUDA device; there is none here")
        if self.path.suffix != ".onnx":  # a file of any other name is native code
            _check_machine(path, self.description)
        # Otherwise, a process that only runs files spends half of a small network's time on clearing pages.
        keep_freed_memory()
        try:
            load = onnx_file.load if self.path.suffix == ".onnx" else _load_archive
            with _named_in_ascii(self.path) as file:
                self._run: Callable[[Tensor], Sequence[Tensor]] = load(file)
        except DAMAGED as error:
            made, here = self.description.versions.get("torch", "?"), str(torch.__version__)
            hint = f"; it was made with PyTorch {made}, and here is {here}" * (made != here)
            raise PackageError(f"{path} cannot be loaded: {str(error).partition(chr(10))[0]}{hint}") from error

    def __call__(self, x: Tensor) -> Prediction:
        """Run a batch ``(B, *input_shape)``, already normalized, ``1 <= B <= max_batch``.

        Raises:
            ValueError: The shape or batch size is wrong.
            TypeError: The dtype is wrong.
            PackageError: The graph cannot run, or its outputs do not fit the description.
        """
        return self.explain(x)[0]

    def explain(self, x: Tensor) -> tuple[Prediction, dict[str, Tensor]]:
        """Run a batch like `__call__`; also return the evidence ``(B,)`` by name, empty if the file has none."""
        outputs = self._outputs(x)
        columns = outputs.pop("evidence").unbind(-1) if self.description.evidence else ()
        threshold = self.description.threshold
        if threshold is not None:
            outputs["flagged"] = outputs["uncertainty"] > threshold
        return Prediction(**outputs), dict(zip(self.description.evidence or (), columns, strict=True))

    def rows(self, x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Run a batch like `__call__`; return float64 rows of probabilities, uncertainty, and any risk and evidence."""
        _, *columns = self._outputs(x).values()
        return torch.cat([column.double().view(len(x), -1) for column in columns], 1).cpu().numpy()

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Return the graph's outputs by name, checked against the description."""
        checks.is_tensor("x", x)
        expected = self.description.input_shape
        if tuple(x.shape[1:]) != expected or not 1 <= len(x) <= self.description.max_batch:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, expected))}) with 1 <= B <= "
                f"{self.description.max_batch}; it was {tuple(x.shape)}"
            )
        if x.dtype != DTYPES[self.description.input_dtype]:
            raise TypeError(f"x must have dtype {self.description.input_dtype}; it was {x.dtype}")
        try:
            outputs = self._run(x.to(self.description.device).contiguous())
        except RuntimeError as error:
            raise PackageError(f"{self.path} cannot be run: {str(error).partition(chr(10))[0]}") from error
        rows = outputs_of(self.description)
        shapes = [tuple(value.shape) for value in outputs]
        if shapes != [(len(x), *row) for row in rows.values()]:
            raise PackageError(f"{self.path} gives {shapes} for {len(x)} inputs; its description says {rows} an input")
        return dict(zip(rows, outputs, strict=True))
