"""Scoring on Ray: from a laptop to a cluster without another line of code.

`score_dataset` hands the parts of a job to Ray Data. A worker process loads the model once and writes each
part it finishes under the part's own name, atomically. That makes a repetition harmless: if a worker is
killed, Ray runs its part again elsewhere, and the same file appears once. What was written stays written,
so a second run does only what is missing. On several nodes, model, images and output must lie where all
of them can read and write, such as a network file system.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.file.package import ModelPackage, read_description
from fastgrad.deploy.score.job import (
    Job,
    Limits,
    arrow_schema,
    count_rows,
    is_part,
    part_path,
    progress_bar,
    score_sources,
    write_part,
)


class PartScorer:
    """The stateful worker of `score_dataset`: loads the model once, then scores and writes whole parts."""

    def __init__(
        self,
        model: str,
        job: Job,
        identity: str,
        folder: str,
        batch: int,
        threshold: float | None,
        limits: Limits,
    ) -> None:
        self.model = ModelPackage(model)
        self.job, self.identity, self.folder = job, identity, Path(folder)
        self.batch, self.threshold, self.limits = batch, threshold, limits
        self.pool = ThreadPoolExecutor(2)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Score the parts whose numbers are ``parts["id"]``; return how many images each held."""
        sizes = []
        for index in parts["id"].tolist():
            found = score_sources(
                self.model, self.job.sources(index, self.limits),
                batch=self.batch, threshold=self.threshold, limits=self.limits, pool=self.pool,
            )  # fmt: skip
            rows = [row for rows in found for row in rows]
            write_part(
                rows, part_path(self.folder, index), arrow_schema(self.model.description), self.identity
            )
            sizes.append(len(rows))
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
    max_pixels: int = Limits().pixels,
    max_bytes: int = Limits().size,
    gpus_per_worker: float = 0,
    progress: bool = False,
) -> dict[str, int]:
    """Score a folder or Parquet file on a Ray cluster (or on this machine, if no cluster is connected).

    Args:
        model: file written by `fastgrad.export`.
        images: folder, or Parquet file.
        out: new folder for the parts, ``part-00000000.parquet`` and so on, in the order of the images; readers of
            Parquet take the folder as one table. An unfinished run is continued.
        workers: processes that hold the model, anywhere in the cluster.
        batch: images in one run of the model.
        part: images in one part, the unit of repetition.
        false_alarm_rate: share of in-distribution images to call unreliable; None: the model file's own.
        image_column: of the Parquet file; None guesses.
        key_column: column that names the rows; None guesses.
        max_pixels: larger images are not decoded.
        max_bytes: larger files, and cells of a Parquet file, are not read.
        gpus_per_worker: GPUs that each worker claims.
        progress: show a progress bar.

    Returns:
        ``images``, ``unreadable``, ``unreliable``, ``continued``, as `fastgrad.deploy.score.local.score`.

    Raises:
        ValueError: arguments that do not fit, no images, or parts of another job in ``out``.
        PackageError: not an exported model.
    """
    with extra("cluster"):
        import ray

    if workers < 1 or batch < 1:
        raise ValueError(f"workers and batch must be at least 1; they were {workers} and {batch}")
    model_path, folder = Path(model).resolve(), Path(out).resolve()
    threshold = read_description(model_path).threshold_at(false_alarm_rate)
    job = Job(Path(images), part, image_column, key_column)
    limits = Limits(max_pixels, max_bytes)
    identity = job.open(folder, model_path, threshold, limits)
    missing = [index for index in range(job.parts) if not is_part(part_path(folder, index), identity)]
    continued = job.total - sum(job.size(index) for index in missing)
    bar = progress_bar(job.total, continued, progress)
    if missing:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.from_items([{"id": index} for index in missing], override_num_blocks=len(missing))
        done = data.map_batches(
            PartScorer,
            fn_constructor_args=(str(model_path), job, identity, str(folder), batch, threshold, limits),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_gpus=gpus_per_worker or None,
        )
        for row in done.iter_rows():
            bar.update(row["size"])
    bar.close()
    counts = count_rows(part_path(folder, index) for index in range(job.parts))
    return {**counts, "continued": continued}
