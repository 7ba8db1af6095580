"""Scoring on this machine: one row per image; that of an unreadable image has an ``error``.

Rows are written in parts. A part gets its final name only when it is complete, so a stopped run can continue.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastgrad.checks import at_least, is_path
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.score.job import Job, arrow_schema, check_out, count_rows, join_parts
from fastgrad.deploy.score.sources import MAX_BYTES


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
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    decoders: int | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Score a folder or Parquet file of images into one Parquet file; continue an unfinished run.

    Args:
        model_path: File written by `fastgrad.export`.
        images: A Parquet file; or a folder, whose image files are found by their suffixes, also in subfolders that are
            not links.
        out: The Parquet file to write. Until it is complete, its parts lie next to it in ``<out>.parts``.
        batch: Images in one run of the model.
        part: Images in one part, the most that an interrupted run loses.
        false_alarm_rate: Share of in-distribution images to call unreliable; None for the model file's own.
        image_column: Column of the images in the Parquet file; None tries usual names.
        key_column: Column of the names of rows; None tries usual names.
        max_pixels: Larger images are not decoded.
        max_bytes: Larger files, and cells of a Parquet file, are not read.
        decoders: Threads that decode images; None for one per processor core.
        progress: Whether to show a progress bar.

    Returns:
        The numbers of ``images``, of ``unreadable`` and ``unreliable`` ones, and of those ``continued`` from an
        earlier run.

    Raises:
        TypeError, ValueError: An argument does not fit, there are no images, ``<out>.parts`` belongs to another job,
            another program's file is in the place of ``out``, or another run wrote it in the meantime.
        PackageError: The file is not an exported model.
    """
    is_path(model_path=model_path, images=images, out=out)
    decoders = os.cpu_count() or 1 if decoders is None else decoders
    at_least(1, batch=batch, part=part, max_pixels=max_pixels, max_bytes=max_bytes, decoders=decoders)
    target, model = Path(out), ModelPackage(model_path)
    check_out(target, arrow_schema(model.description))
    job = Job(
        Path(model_path), model.description, Path(images), target.with_name(target.name + ".parts"), target,
        batch=batch, part=part, false_alarm_rate=false_alarm_rate, columns=(image_column, key_column),
        max_pixels=max_pixels, max_bytes=max_bytes,
    )  # fmt: skip
    try:
        with job.progress_bar(progress) as bar, ThreadPoolExecutor(decoders) as pool:
            for index in job.missing:
                job.write(model, index, pool, bar.update)
        counts = count_rows(job.paths)
        join_parts(job, target)
    except FileNotFoundError:
        if job.folder.exists():
            raise
        raise ValueError(f"{job.folder} was removed meanwhile, as by another run with this out that ended") from None
    return {**counts, "continued": job.done}
