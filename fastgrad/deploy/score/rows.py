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
from fastgrad.deploy.file.images import ImageError, decode_pixels
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.score.sources import Source

with extra("score"):
    import pyarrow as pa

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


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

    Returns:
        Rows with ``name``, ``class``, ``label``, ``probability`` (of that class), ``uncertainty``, ``risk``,
        ``reliable``, ``evidence`` and ``alarm``, as the server's answers have them (`answer`), and ``error``; where the
        image cannot be read, ``error`` says why and the others are None.
    """
    waiting: deque[tuple[str, Future[Pixels | str]]] = deque()
    size = min(batch, model.description.max_batch)
    while True:
        for source in itertools.islice(sources, 2 * size - len(waiting)):
            waiting.append((source.name, pool.submit(_decode, source, model.description, max_pixels, max_bytes)))
        if not waiting:
            return
        yield _score(model, [waiting.popleft() for _ in range(min(size, len(waiting)))], threshold)


def _score(
    model: ModelPackage, items: list[tuple[str, Future[Pixels | str]]], threshold: float | None
) -> list[dict[str, Any]]:
    description = model.description
    columns = arrow_schema(description).names
    decoded = [future.result() for _, future in items]
    rows: list[dict[str, Any]] = [
        dict.fromkeys(columns) | {"name": name, "error": value if isinstance(value, str) else None}
        for (name, _), value in zip(items, decoded, strict=True)
    ]
    good = [(row, value) for row, value in zip(rows, decoded, strict=True) if not isinstance(value, str)]
    if good:
        pixels = torch.from_numpy(np.stack([value for _, value in good]))
        for (row, _), values in zip(good, model.rows(normalize_pixels(description, pixels)), strict=True):
            try:
                fields = answer(description, threshold, values)
            except ResultError as error:
                row["error"] = str(error)
                continue
            row |= {"probability": fields.pop("probabilities")[fields["class"]], **fields}
    return rows


def _decode(source: Source, description: Description, max_pixels: int, max_bytes: int) -> Pixels | str:
    try:
        content = source.content
        if isinstance(content, Path):
            with content.open("rb") as file:
                # Python takes the memory for all that may be read.
                content = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        if len(content) > max_bytes:
            return f"the image is too large; at most {max_bytes} bytes are read"
        return decode_pixels(content, description.input_shape, max_pixels=max_pixels)
    except ImageError as error:
        return str(error)
    except OSError as error:
        # Without the path, which an error's own text has.
        return f"the file cannot be read: {error.strerror or type(error).__name__}"


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
