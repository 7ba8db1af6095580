"""Scoring on this machine: one row per image, even if it is unreadable.

Rows are written in parts, each under its final name only when it is complete, so a stopped run continues where it
stopped. An unreadable image gets a row whose ``error`` says why.
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
        model_path: file written by `fastgrad.export`.
        images: a folder, of which all files with an image's suffix count, also in subfolders that are not links; or a
            Parquet file.
        out: the Parquet file to write. Until it is whole, its parts lie beside it in ``<out>.parts``.
        batch: images in one run of the model.
        part: images in one part, the most that an interrupted run loses.
        false_alarm_rate: share of in-distribution images to call unreliable; None: the model file's own.
        image_column: of the Parquet file; None guesses.
        key_column: column whose value becomes the row's name; None guesses.
        max_pixels: larger images are not decoded.
        max_bytes: larger files, and cells of a Parquet file, are not read.
        decoders: threads that decode images; None: one per processor core.
        progress: show a progress bar.

    Returns:
        ``images``, ``unreadable``, ``unreliable``: how many there were; ``continued``: how many came from an
        earlier run.

    Raises:
        TypeError, ValueError: arguments that do not fit, no images, parts of another job beside ``out``, a file of
            another program in its place, or another run that wrote ``out`` in the meantime.
        PackageError: not an exported model.
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
