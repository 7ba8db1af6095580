"""The process that reads what clients send (images, forms and JSON) with little memory and without PyTorch.

A request is a line of JSON with the arguments of `read_input`, then the body. The reply is the byte `PIXELS` or
`NUMBERS`, then the input.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from fastgrad.deploy.file.images import ImageError, ImageTooLargeError, decode_pixels
from fastgrad.deploy.serve.child import RequestError

#: First byte of a reply: pixels from 0 to 255, to be normalized, or float32 or float64 numbers that the model takes.
PIXELS, NUMBERS = b"p", b"n"
#: Bytes that decoding may use in addition to the process itself.
MEMORY = 512 * 2**20
#: Largest finite numbers of the input dtypes; NumPy has no bfloat16.
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028235e38, "float64": 1.7976931348623157e308}


def start(max_pixels: int) -> Callable[[bytearray], bytes]:
    """Prepare this process and return the function that answers requests."""
    import PIL.Image

    PIL.Image.preinit()
    _limit_memory()
    # The answer reports faults of forms and images; each part and image could also add a line to the log.
    logging.disable()
    warnings.simplefilter("ignore")

    def answer(request: bytearray) -> bytes:
        try:
            body = request.index(b"\n") + 1
            kind, shape, dtype = json.loads(request[:body])
            return read_input(kind, bytes(memoryview(request)[body:]), shape, dtype, max_pixels=max_pixels)
        except MemoryError:
            raise RequestError(413, "reading the body needs more memory than is allowed") from None

    return answer


def _limit_memory() -> None:
    """Limit this process to `MEMORY` more bytes and no core dump, if the system enforces limits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_input(content_type: str, body: bytes, shape: Sequence[int], dtype: str, *, max_pixels: int) -> bytes:
    """Read an image, a form with a ``file``, or JSON ``{"inputs": [...]}`` that the client has normalized.

    Return `PIXELS` or `NUMBERS`, then the input. RequestError 400 if the body is unreadable, 413 if too large, 415 for
    another content type, 422 if it does not fit the model.
    """
    shape = tuple(shape)
    kind = content_type.split(";", 1)[0].strip().lower()
    if kind == "application/json":
        return NUMBERS + _json_input(body, shape, dtype)
    if kind == "multipart/form-data":
        body = _file_of_form(content_type, body)
    elif not kind.startswith("image/"):
        kinds = "an image (Content-Type image/*), a form with a field 'file' (multipart/form-data), or JSON"
        raise RequestError(415, f"send {kinds} (application/json); the content type was {kind[:80] or 'missing'!r}")
    try:
        return PIXELS + decode_pixels(body, shape, max_pixels=max_pixels).tobytes()
    except ImageTooLargeError as error:
        raise RequestError(413, str(error)) from None
    except ImageError as error:
        raise RequestError(400, str(error)) from None


def _file_of_form(content_type: str, body: bytes) -> bytes:
    from python_multipart.multipart import create_form_parser

    files: list[bytes] = []

    def keep(file: Any) -> None:
        if file.field_name == b"file":
            file.file_object.seek(0)
            files.append(file.file_object.read())

    try:
        # Large enough that nothing is written to disk.
        config, headers = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}, {"Content-Type": content_type.encode("latin-1")}
        parser = create_form_parser(headers, lambda field: None, keep, config=config)
        parser.write(body)
        parser.finalize()
    except MemoryError:
        raise
    except Exception as error:
        raise RequestError(400, f"the form cannot be read: {(str(error) or type(error).__name__)[:200]}") from None
    if len(files) != 1:
        raise RequestError(422, f"the form must have one field 'file' with an image file; there were {len(files)}")
    return files[0]


def _json_input(body: bytes, shape: tuple[int, ...], dtype: str) -> bytes:
    def refuse(constant: str) -> NoReturn:
        raise RequestError(422, f"inputs must be finite numbers; {constant} was among them")

    expected = f"inputs must be numbers in nested lists of shape {list(shape)}"
    # Checked before parsing: each object takes some fifty bytes.
    most = 2 * math.prod(shape) + 100
    if any(body.count(sign) > most for sign in (b",", b"[", b"{", b":")):
        raise RequestError(422, f"{expected}; there were more")
    try:
        # As UTF-8: json would also take UTF-16, in which the search for words below finds nothing.
        content = json.loads(body.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"the body is not valid JSON: {reason[:200]}") from None
    if not isinstance(content, dict) or "inputs" not in content:
        raise RequestError(422, 'the JSON body must be an object with the key "inputs"')
    try:
        values = np.array(content["inputs"])
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise RequestError(422, f"{expected}; the lists were ragged or nested too deeply") from None
    # NumPy reads true among numbers as 1.
    words = b"true" in body or b"false" in body
    if values.dtype.kind not in "iuf" or (words and bool in map(type, np.array(content["inputs"], object).flat)):
        raise RequestError(422, f"{expected}; something else was among them")
    if values.shape == (1, *shape):
        values = values[0]
    if values.shape != shape:
        raise RequestError(422, f"{expected}; the shape was {list(values.shape)}")
    values = values.astype(np.float64)
    if not (np.abs(values) <= _LARGEST[dtype]).all():
        raise RequestError(422, f"inputs must be finite numbers of type {dtype}")
    return values.astype(np.float64 if dtype == "float64" else np.float32).tobytes()
