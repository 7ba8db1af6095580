"""Scoring on this machine: one row an image, whatever the image.

Images come from a folder (recursively, every file with an image's name) or from a Parquet file with a
column of image bytes. Rows are written in parts, each under its final name only when it is complete. So a
stopped run continues where it stopped. An unreadable image gets a row whose ``error`` says why.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.score.job import (
    Job,
    Limits,
    arrow_schema,
    count_rows,
    is_part,
    join_parts,
    part_path,
    progress_bar,
    score_sources,
    write_part,
)


def score(
    model_path: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch: int = 64,
    part: int = 4096,
    false_alarm_rate: float | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    max_pixels: int = Limits().pixels,
    max_bytes: int = Limits().size,
    decoders: int | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Score a folder or Parquet file of images into one Parquet file; continue an unfinished run.

    Args:
        model_path: file written by `fastgrad.export`.
        images: folder, or ``.parquet`` file.
        out: the Parquet file to write. Until it is whole, its parts lie beside it in ``<out>.parts``.
        batch: images in one run of the model.
        part: images in one part, the most that an interrupted run loses.
        false_alarm_rate: share of in-distribution images to call unreliable; None: the model file's own.
        image_column: of the Parquet file; None guesses.
        key_column: column whose value becomes the row's name; None guesses.
        max_pixels: larger images are not decoded.
        max_bytes: larger files, and cells of a Parquet file, are not read.
        decoders: threads that decode images; None: one a processor core.
        progress: show a progress bar.

    Returns:
        ``images``, ``unreadable``, ``unreliable``: how many there were; ``continued``: how many came from an
        earlier run.

    Raises:
        ValueError: arguments that do not fit, no images, or parts of another job beside ``out``.
        PackageError: not an exported model.
    """
    target = Path(out)
    if batch < 1:
        raise ValueError(f"batch must be at least 1; it was {batch}")
    if not target.parent.is_dir():
        raise ValueError(f"out must lie in an existing folder; there is no {str(target.parent)!r}")
    model = ModelPackage(model_path)
    threshold, schema = model.description.threshold_at(false_alarm_rate), arrow_schema(model.description)
    job = Job(Path(images), part, image_column, key_column)
    parts = target.with_name(target.name + ".parts")
    limits = Limits(max_pixels, max_bytes)
    identity = job.open(parts, Path(model_path), threshold, limits)
    done = [index for index in range(job.parts) if is_part(part_path(parts, index), identity)]
    continued = sum(job.size(index) for index in done)
    bar = progress_bar(job.total, continued, progress)
    with ThreadPoolExecutor(decoders or os.cpu_count() or 1) as pool:
        for index in sorted(set(range(job.parts)) - set(done)):
            rows: list[dict[str, Any]] = []
            sources = job.sources(index, limits)
            for found in score_sources(
                model, sources, batch=batch, threshold=threshold, limits=limits, pool=pool
            ):
                rows += found
                bar.update(len(found))
            write_part(rows, part_path(parts, index), schema, identity)
    bar.close()
    counts = count_rows(part_path(parts, index) for index in range(job.parts))
    join_parts(parts, job.parts, target, schema)
    return {**counts, "continued": continued}
