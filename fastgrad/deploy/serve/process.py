"""What runs in a process of the pool: load the model, turn bodies into inputs, answer them."""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.description import DTYPES, Description, normalize_pixels
from fastgrad.deploy.file.images import ImageError, ImageTooLargeError, decode_pixels
from fastgrad.deploy.file.package import ModelPackage

#: Seconds of computing in which an image must be decoded.
DECODE_SECONDS = 1.0


class Body(NamedTuple):
    """A request's body, with its content type."""

    kind: str
    content: bytes


class Refusal(NamedTuple):
    """Why there is no answer: an HTTP status, and the reason for the client."""

    status: int
    reason: str


class UnusableError(ValueError):
    """The body is not an input of the model."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Answerer:
    """A loaded model that answers bodies; the arguments are those of `create_app`.

    PackageError if the file cannot be loaded or does not answer an input of zeros.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        false_alarm_rate: float | None,
        max_pixels: int,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.max_pixels = ModelPackage(path), max_pixels
        self.description = known = self.model.description
        self.threshold = known.threshold_at(false_alarm_rate)
        # The first run also allocates memory and starts threads; no request should wait for that.
        self.model.rows(torch.zeros(1, *known.input_shape, dtype=DTYPES[known.input_dtype], device="cpu"))

    def __call__(self, bodies: list[Body]) -> list[dict[str, Any] | Refusal]:
        """Return for each body an answer or a refusal; the inputs among them run as one batch."""
        found: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged images
            for body in bodies:
                try:
                    found.append(read_input(body, self.description, self.max_pixels))
                except UnusableError as error:
                    found.append(Refusal(error.status, str(error)))
                except MemoryError:
                    found.append(Refusal(413, "reading the body needs more memory than there is"))
        places = [place for place, x in enumerate(found) if isinstance(x, Tensor)]
        if places:
            rows = self.model.rows(torch.stack([found[place] for place in places]))
            for place, row in zip(places, rows, strict=True):
                try:
                    found[place] = answer(self.description, self.threshold, row)
                except ResultError as error:
                    found[place] = Refusal(422, str(error))
        return found


_loaded: Answerer | Exception = RuntimeError("no model is loaded")


def load(path: str, options: dict[str, Any]) -> None:
    """Prepare this process, and load the model; `check` raises what went wrong."""
    global _loaded
    # A service manager may signal all processes at a stop or a reload, but only the server decides when these end.
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Beside the model, so that what a killed process leaves is removed with it.
    os.environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(Path(path).parent))
    tempfile.tempdir = None
    try:
        _loaded = Answerer(path, **options)
    except Exception as error:
        _loaded = error


def check() -> None:
    """Raise PackageError, or another exception, if the model is not loaded."""
    if isinstance(_loaded, Exception):
        raise _loaded


def answers(bodies: list[Body]) -> list[dict[str, Any] | Refusal]:
    """Answer bodies with the model of this process."""
    if isinstance(_loaded, Exception):
        raise _loaded
    return _loaded(bodies)


def read_input(body: Body, description: Description, max_pixels: int) -> Tensor:
    """Return the input in a body: an image, or JSON ``{"inputs": [...]}`` that the client has normalized.

    UnusableError 400 if it is unreadable, 413 if it has too many pixels, 415 for another content type, 422 if it does
    not fit the model.
    """
    kind = body.kind.split(";", 1)[0].strip().lower()
    if kind == "application/json":
        return _numbers(body.content, description)
    if not kind.startswith("image/"):
        kinds = "an image (Content-Type image/*) or JSON (application/json)"
        raise UnusableError(415, f"send {kinds}; the content type was {kind[:80] or 'missing'!r}")
    try:
        shape = description.input_shape
        pixels = decode_pixels(body.content, shape, max_pixels=max_pixels, seconds=DECODE_SECONDS)
    except ImageTooLargeError as error:
        raise UnusableError(413, str(error)) from None
    except ImageError as error:
        raise UnusableError(400, str(error)) from None
    return normalize_pixels(description, torch.from_numpy(pixels))


def _numbers(content: bytes, description: Description) -> Tensor:
    def refuse(constant: str) -> NoReturn:
        raise UnusableError(422, f"inputs must be finite numbers; {constant} was among them")

    shape, dtype = description.input_shape, description.input_dtype
    expected = f"inputs must be numbers in nested lists of shape {list(shape)}"
    # Checked before parsing: each object takes some fifty bytes.
    most = 2 * math.prod(shape) + 100
    if any(content.count(sign) > most for sign in (b",", b"[", b"{", b":")):
        raise UnusableError(422, f"{expected}; there were more")
    try:
        # As UTF-8: json would also take UTF-16, in which the search for words below finds nothing.
        found = json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
    except UnusableError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnusableError(400, f"the body is not valid JSON: {reason[:200]}") from None
    if not isinstance(found, dict) or "inputs" not in found:
        raise UnusableError(422, 'the JSON body must be an object with the key "inputs"')
    try:
        values = np.array(found["inputs"])
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UnusableError(422, f"{expected}; the lists were ragged or nested too deeply") from None
    # NumPy reads true among numbers as 1.
    words = b"true" in content or b"false" in content
    if values.dtype.kind not in "iuf" or (words and bool in map(type, np.array(found["inputs"], object).flat)):
        raise UnusableError(422, f"{expected}; something else was among them")
    if values.shape == (1, *shape):
        values = values[0]
    if values.shape != shape:
        raise UnusableError(422, f"{expected}; the shape was {list(values.shape)}")
    x = torch.from_numpy(values.astype(np.float64)).to(DTYPES[dtype])
    if not x.isfinite().all():
        raise UnusableError(422, f"inputs must be finite numbers of type {dtype}")
    return x
