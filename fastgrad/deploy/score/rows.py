"""The row that each image gets: decoded in threads while the model runs, and an error where it cannot be read."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrad.checks import extra
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.description import Description, normalize_pixels
from fastgrad.deploy.file.images import Array, ImageError, ImageTooLargeError, decode_pixels
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.score.sources import Source

with extra("score"):
    import pyarrow as pa


def score_sources(
    model: ModelPackage,
    sources: Iterator[Source],
    *,
    batch: int,
    threshold: float | None,
    max_pixels: int,
    max_bytes: int,
    pool: ThreadPoolExecutor,
) -> Iterator[list[dict[str, Any]]]:
    """Score images; the rows of one batch after another, in their order. The next ones are decoded meanwhile.

    A row has the columns of `arrow_schema`: the image's name, what the server answers (`answer`), with the probability
    of the class alone, and ``error``. Where the image cannot be read, ``error`` says why and the others are None.
    """
    waiting: deque[tuple[str, Future[Array]]] = deque()
    size = min(batch, model.description.max_batch)
    while True:
        for source in itertools.islice(sources, 2 * size - len(waiting)):
            waiting.append((source.name, pool.submit(_decode, source, model.description, max_pixels, max_bytes)))
        if not waiting:
            return
        yield _score(model, [waiting.popleft() for _ in range(min(size, len(waiting)))], threshold)


def _score(
    model: ModelPackage, items: list[tuple[str, Future[Array]]], threshold: float | None
) -> list[dict[str, Any]]:
    description = model.description
    rows: list[dict[str, Any]] = [dict.fromkeys(arrow_schema(description).names) | {"name": name} for name, _ in items]
    readable, images = [], []
    for row, (_, decoded) in zip(rows, items, strict=True):
        try:
            images.append(decoded.result())
            readable.append(row)
        except ImageError as error:
            row["error"] = str(error)
    if images:
        pixels = torch.from_numpy(np.stack(images))
        for row, values in zip(readable, model.rows(normalize_pixels(description, pixels)), strict=True):
            try:
                fields = answer(description, threshold, values)
                row |= {"probability": fields.pop("probabilities")[fields["class"]], **fields}
            except ResultError as error:
                row["error"] = str(error)
    return rows


def _decode(source: Source, description: Description, max_pixels: int, max_bytes: int) -> Array:
    content = source.content
    if isinstance(content, Path):
        try:
            with content.open("rb") as file:
                # Python takes the memory for all that may be read.
                content = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            # Without the path, which an error's own text has.
            raise ImageError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    if len(content) > max_bytes:
        raise ImageTooLargeError(f"the image is too large; at most {max_bytes} bytes are read")
    return decode_pixels(content, description.input_shape, max_pixels=max_pixels)


def arrow_schema(description: Description) -> Any:
    """The columns of the output; ``evidence`` has a field for each part, and is null where the file gives none."""
    names = description.evidence
    evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
    return pa.schema(
        [
            ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
            ("uncertainty", pa.float64()), ("risk", pa.float64()), ("reliable", pa.bool_()), ("evidence", evidence),
            ("alarm", pa.string()), ("error", pa.string()),
        ]
    )  # fmt: skip
