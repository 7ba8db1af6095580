"""Scoring on Ray: the parts of a job go to Ray Data, on this machine or on a cluster.

If a worker is killed, Ray runs its part again elsewhere. That is harmless: a part appears whole, and once.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrad.checks import at_least, extra, is_path
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.file.package import ModelPackage, read_description
from fastgrad.deploy.score.job import Job, count_rows
from fastgrad.deploy.score.sources import MAX_BYTES


class PartScorer:
    """Loads the model once, then scores and writes whole parts."""

    def __init__(self, job: Job) -> None:
        self.model, self.job, self.pool = ModelPackage(job.model), job, ThreadPoolExecutor(2)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Score the parts of these numbers; return how many images each held."""
        sizes = [self.job.write(self.model, index, self.pool) for index in parts["id"].tolist()]
        return {"id": parts["id"], "size": sizes}


def score_dataset(
    model: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    batch: int = 64,
    part: int = 4096,
    false_alarm_rate: float | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    gpus_per_worker: float = 0,
    progress: bool = False,
) -> dict[str, int]:
    """Score a folder or Parquet file on a Ray cluster (or on this machine, if no cluster is connected).

    On several nodes, model, images and output must lie where all of them can read and write, such as a network file
    system.

    Args:
        model: file written by `fastgrad.export`.
        images: folder, or Parquet file.
        out: new folder for the parts, ``part-00000000.parquet`` and so on, in the order of the images; readers of
            Parquet take the folder as one table. An unfinished run is continued.
        workers: processes that hold the model, anywhere in the cluster.
        batch: images in one run of the model.
        part: images in one part, the unit of repetition.
        false_alarm_rate: as for `fastgrad.deploy.score.local.score`, and so are the next four.
        image_column: of the Parquet file.
        key_column: of the Parquet file.
        max_pixels: of an image.
        max_bytes: of an image's file or cell.
        gpus_per_worker: GPUs that each worker claims.
        progress: show a progress bar.

    Returns:
        ``images``, ``unreadable``, ``unreliable``, ``continued``, as `fastgrad.deploy.score.local.score`.

    Raises:
        TypeError, ValueError: arguments that do not fit, no images, or parts of another job in ``out``.
        PackageError: not an exported model.
    """
    with extra("cluster"):
        import ray

    is_path(model=model, images=images, out=out)
    at_least(1, workers=workers, batch=batch, part=part, max_pixels=max_pixels, max_bytes=max_bytes)
    path, folder = Path(model).resolve(), Path(out).resolve()
    job = Job(
        path, read_description(path), Path(images), folder, folder, batch=batch, part=part,
        false_alarm_rate=false_alarm_rate, columns=(image_column, key_column), max_pixels=max_pixels,
        max_bytes=max_bytes,
    )  # fmt: skip
    if job.missing:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [{"id": index} for index in job.missing]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartScorer, fn_constructor_args=(job,), batch_size=1, num_gpus=gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        )  # fmt: skip
        with job.progress_bar(progress) as bar:
            for row in done.iter_rows():
                bar.update(row["size"])
    return {**count_rows(job.paths), "continued": job.done}
