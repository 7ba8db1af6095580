"""From a request's body to an input: what does not depend on a web server."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastgrad.deploy.file.images import MAX_PIXELS, ImageError, ImageTooLargeError, decode_image
from fastgrad.deploy.file.package import Description

MAX_BODY = 16 * 2**20


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: the HTTP status that says so.
        message: for the person who sent it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


async def read_input(
    content_type: str, body: bytes, description: Description, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Read an image, a form with a ``file``, or JSON ``{"inputs": [...]}``; decoding runs in a thread.

    Returns:
        ``input_shape``, ready for the model. Images are normalized here; JSON inputs are what the model
        takes, so whoever sends them has normalized them.

    Raises:
        RequestError: 400 unreadable, 413 too many pixels, 415 another content type, 422 not this model's
            input.
    """
    from starlette.concurrency import run_in_threadpool

    kind = content_type.split(";", 1)[0].strip().lower()
    if kind == "multipart/form-data":
        body = await _file_of_form(content_type, body)
    elif kind == "application/json":
        return await run_in_threadpool(_json_input, body, description)
    elif not kind.startswith("image/"):
        raise RequestError(
            415,
            "send an image (Content-Type image/*), a form with a field 'file' (multipart/form-data), or JSON "
            f"(application/json); the content type was {kind[:80] or 'missing'!r}",
        )
    try:
        return await run_in_threadpool(decode_image, body, description, max_pixels=max_pixels)
    except ImageTooLargeError as error:
        raise RequestError(413, str(error)) from None
    except ImageError as error:
        raise RequestError(400, str(error)) from None


async def _file_of_form(content_type: str, body: bytes) -> bytes:
    from starlette.datastructures import Headers, UploadFile
    from starlette.formparsers import MultiPartParser

    async def stream() -> Any:
        yield body

    try:
        headers = Headers({"content-type": content_type})
        parser = MultiPartParser(headers, stream(), max_files=4, max_fields=16, max_part_size=len(body) + 1)
        # The body is in memory already; no detour over a file on disk.
        parser.spool_max_size = len(body) + 1
        form = await parser.parse()
    except Exception as error:
        # The parser's own errors and those of the library below it.
        reason = getattr(error, "message", None) or str(error) or type(error).__name__
        raise RequestError(400, f"the form cannot be read: {reason[:200]}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RequestError(422, "the form must have a field 'file' that holds an image file")
        return await file.read()
    finally:
        await form.close()


def _json_input(body: bytes, description: Description) -> Tensor:
    def refuse(constant: str) -> NoReturn:
        raise RequestError(422, f"inputs must be finite numbers; {constant} was among them")

    try:
        content = json.loads(body, parse_constant=refuse)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"the body is not valid JSON: {reason[:200]}") from None
    if not isinstance(content, dict) or "inputs" not in content:
        raise RequestError(422, 'the JSON body must be an object with the key "inputs"')
    shape = description.input_shape
    expected = f"inputs must be numbers in nested lists of shape {list(shape)}"
    try:
        values = np.array(content["inputs"])
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise RequestError(422, f"{expected}; the lists were ragged or nested too deeply") from None
    if values.dtype.kind not in "iuf":
        raise RequestError(422, f"{expected}; something else was among them")
    if values.shape == (1, *shape):
        values = values[0]
    if values.shape != shape:
        raise RequestError(422, f"{expected}; the shape was {list(values.shape)}")
    tensor = torch.from_numpy(values.astype(np.float64)).to(getattr(torch, description.input_dtype))
    if not torch.isfinite(tensor).all():
        raise RequestError(422, f"inputs must be finite numbers of type {description.input_dtype}")
    return tensor
