"""``fastgrad score MODEL.pt2 IMAGES --out scores.parquet``: one row an image, whatever the image.

Images come from a folder (recursively, every file with an image's name) or from a Parquet file with a
column of image bytes. Work is done in parts: each part is written under its final name only when it is
whole, so a run that was stopped, however, goes on where it left off and repeats nothing. An unreadable
image gets a row whose ``error`` says why.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrad.images import MAX_PIXELS
from fastgrad.package import ModelPackage, PackageError
from fastgrad.scoring import Job, count_rows, join_parts, part_path, score_batch, write_part


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
    threshold = model.description.threshold_at(false_alarm_rate)
    job = Job(Path(images), part, image_column, key_column)
    parts = target.with_name(target.name + ".parts")
    job.open(parts, Path(model_path), threshold, max_pixels)
    done = [index for index in range(job.parts) if part_path(parts, index).exists()]
    continued = sum(job.size(index) for index in done)
    bar = progress_bar(job.total, continued, progress)
    with ThreadPoolExecutor(decoders or os.cpu_count() or 1) as pool:
        for index in sorted(set(range(job.parts)) - set(done)):
            rows: list[dict[str, Any]] = []
            sources = job.sources(index)
            while items := list(itertools.islice(sources, batch)):
                rows += score_batch(model, items, threshold=threshold, max_pixels=max_pixels, pool=pool)
                bar.update(len(items))
            write_part(rows, part_path(parts, index))
    bar.close()
    counts = count_rows(part_path(parts, index) for index in range(job.parts))
    join_parts(parts, job.parts, target)
    return {**counts, "continued": continued}


def progress_bar(total: int, done: int, show: bool) -> Any:
    """A progress bar over images."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="image", disable=not show)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.pt2)")
    parser.add_argument("images", help="folder of images, or a Parquet file with a column of image bytes")
    parser.add_argument("--out", required=True, help="Parquet file to write, one row an image")
    parser.add_argument("--batch", type=int, default=64, help="images in one run of the model (64)")
    parser.add_argument(
        "--part", type=int, default=4096, help="images between two points to resume from (4096)"
    )
    parser.add_argument("--false-alarm-rate", type=float, help="share of good images to flag (the file's)")
    parser.add_argument("--image-column", help="of the Parquet file (default: image, img, bytes or content)")
    parser.add_argument("--key-column", help="column that names the rows (default: path, name or id)")
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="largest image to decode (50 million)"
    )
    parser.add_argument(
        "--ray", action="store_true", help="on a Ray cluster: --out is then a folder of parts"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="with --ray: processes that hold the model (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Score, and say what there was; return the exit status."""
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        print(f"fastgrad score needs pyarrow: pip install fastgrad[cluster] ({error})", file=sys.stderr)
        return 2
    options = {
        "batch": args.batch, "part": args.part, "false_alarm_rate": args.false_alarm_rate,
        "image_column": args.image_column, "key_column": args.key_column, "max_pixels": args.max_pixels,
    }  # fmt: skip
    try:
        if args.ray:
            from fastgrad.distributed import score_dataset

            counts = score_dataset(args.model, args.images, args.out, workers=args.workers, **options)
        else:
            counts = score(args.model, args.images, args.out, progress=True, **options)
    except (ValueError, PackageError, OSError) as error:
        print(f"fastgrad score: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastgrad score: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(", ".join(f"{value} {key}" for key, value in counts.items()) + f"; written to {args.out}")
    return 0
