"""Scoring on Ray: Ray Data distributes the parts of a job, on this machine or a cluster.

If a worker is killed, Ray runs its part again elsewhere. That is harmless, because a part appears whole and only once.
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
    """Loads the model at its start, then scores and writes whole parts."""

    def __init__(self, job: Job) -> None:
        self.model, self.job, self.pool = ModelPackage(job.model), job, ThreadPoolExecutor(2)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Score the parts with these numbers; return how many images each has."""
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
    """Score a folder or Parquet file on a Ray cluster, or on this machine if no cluster is connected.

    All nodes must be able to read model and images and to write the output, for example on a network file system.

    Args:
        model: File written by `fastgrad.export`.
        images: Folder or Parquet file.
        out: Folder of the parts, ``part-00000000.parquet`` and so on, in the order of the images; readers of Parquet
            take it as one table. It must be new, or that of an unfinished run, which continues.
        workers: Processes that hold the model, anywhere in the cluster.
        batch: Images in one run of the model.
        part: Images in one part, the unit of repetition.
        false_alarm_rate: As for `fastgrad.deploy.score.local.score`, and so are the next four.
        image_column: Column of the images.
        key_column: Column of the names.
        max_pixels: Limit on an image's pixels.
        max_bytes: Limit on the bytes of a file or cell.
        gpus_per_worker: GPUs that each worker claims.
        progress: Whether to show a progress bar.

    Returns:
        The numbers that `fastgrad.deploy.score.local.score` returns.

    Raises:
        TypeError, ValueError: An argument does not fit, there are no images, or ``out`` belongs to another job.
        PackageError: The file is not an exported model.
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
