"""Score many images: one row each, in Parquet parts that are complete or absent, so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastgrad.atomic import written_beside
from fastgrad.checks import at_least, extra, fits_utf8, is_path, without_warnings
from fastgrad.deploy.dataset import MAX_BYTES, Images
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.description import normalize_pixels
from fastgrad.deploy.file.images import MAX_PIXELS, Array, require_images
from fastgrad.deploy.file.opening import digest_of, open_regular
from fastgrad.deploy.file.package import ModelPackage

with extra("score"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.dataset import dataset, field
    from tqdm import tqdm

#: Key of a part's metadata that says of what it is a part.
_JOB = b"fastgrad.job"


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
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Score a folder or Parquet file of images into a folder of Parquet files; parts that are there are not done again.

    Args:
        model_path: File written by `fastgrad.export`.
        images: A Parquet file; or a folder, whose image files are found by their suffixes, also in subfolders that are
            not links.
        out: Folder of the parts, ``part-00000000.parquet`` and so on, in the order of the images; readers of Parquet
            take it as one table. It is made if it is missing.
        batch: Images in one run of the model.
        part: Images in one part, the most that a stopped run loses.
        false_alarm_rate: Share of in-distribution images to call unreliable; None for the model file's own.
        image_column: Column of the images in the Parquet file; None tries usual names.
        key_column: Column of the names of rows; None tries usual names.
        max_pixels: Larger images are not decoded.
        max_bytes: Larger files, and cells of a Parquet file, are not read.
        workers: Processes that decode images; 0 for this one, None for one per processor core.
        progress: Whether to show a progress bar.

    Returns:
        The numbers of ``images``, of ``unreadable`` and ``unreliable`` ones, and of those ``continued`` from an
        earlier run.

    Raises:
        TypeError, ValueError: An argument does not fit, there are no images, or ``out`` holds parts of another model,
            of other images (by name, size and time) or options, or of another program.
        PackageError: The file is not an exported model.
    """
    is_path(model_path=model_path, images=images, out=out)
    at_least(1, batch=batch, part=part, max_pixels=max_pixels, max_bytes=max_bytes)
    workers = os.cpu_count() or 1 if workers is None else workers
    at_least(0, workers=workers)
    scorer = Scorer(model_path, false_alarm_rate=false_alarm_rate, max_pixels=max_pixels)
    listed = Images(Path(images).resolve(), scorer.description, image_column, key_column, max_pixels, max_bytes)
    job = (
        digest_of(model_path), str(listed.path), listed.identity, part, scorer.threshold, image_column, key_column,
        max_pixels, max_bytes,
    )  # fmt: skip
    schema = scorer.schema.with_metadata({_JOB: hashlib.sha256(repr(job).encode("ascii", "backslashreplace")).digest()})
    parts = [Path(out) / f"part-{number:08d}.parquet" for number in range(-(-len(listed) // part))]
    missing = _missing(Path(out), parts, schema)
    ends = {number: min((number + 1) * part, len(listed)) for number in missing}
    size = min(batch, scorer.description.max_batch)
    # No batch crosses the end of a part.
    batches = [
        list(range(start, min(start + size, end)))
        for number, end in ends.items()
        for start in range(number * part, end, size)
    ]
    todo = sum(map(len, batches))
    bar = tqdm(total=len(listed), initial=len(listed) - todo, unit="image", disable=not (progress and sys.stderr))
    loader = DataLoader(listed, batch_sampler=batches, num_workers=workers if batches else 0, collate_fn=list)
    with without_warnings(DeprecationWarning):  # Python's, of processes that are forked beside threads
        loaded = iter(loader)
    rows: list[dict[str, Any]] = []
    for numbers, decoded in zip(batches, loaded, strict=True):
        rows += scorer(decoded)
        bar.update(len(numbers))
        if numbers[-1] + 1 == ends[numbers[-1] // part]:
            with written_beside(parts[numbers[-1] // part]) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
            rows = []
    bar.close()
    table = dataset(parts)
    counted = {"images": None, "unreadable": field("error").is_valid(), "unreliable": ~field("reliable")}
    counts = {name: int(table.count_rows(filter=condition)) for name, condition in counted.items()}
    return {**counts, "continued": len(listed) - todo}


def _missing(out: Path, parts: Sequence[Path], schema: Any) -> list[int]:
    """Make the folder; return the numbers of the parts that it lacks, ValueError if others lie there."""
    if not fits_utf8(str(out)):
        raise ValueError(f"out must be a name in UTF-8, as pyarrow opens no other; it was {str(out)!r}")
    if not out.parent.is_dir() or (os.path.lexists(out) and not out.is_dir()):
        raise ValueError(f"out must be a folder, or a new one in an existing folder; it was {str(out)!r}")
    out.mkdir(exist_ok=True)
    for path in out.glob("part-*.parquet"):
        try:
            # Opening a pipe would wait for its writer.
            with open_regular(path) as file:
                found = (pq.read_schema(file).metadata or {}).get(_JOB)
        except (OSError, pa.ArrowInvalid):
            found = None
        if found != schema.metadata[_JOB]:
            reason = "no part of this program" if found is None else "a part of another model, images or options"
            raise ValueError(f"out must hold no parts but those of this run; {str(path)!r} is {reason}")
    return [number for number, path in enumerate(parts) if not path.exists()]


class Scorer:
    """A loaded model that makes rows of a table. ValueError if it takes no images, or has no threshold for the rate."""

    def __init__(
        self, model: str | os.PathLike[str], *, false_alarm_rate: float | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.model, self.max_pixels = ModelPackage(model), max_pixels
        self.description = self.model.description
        require_images(self.description.input_shape)
        self.threshold = self.description.threshold_at(false_alarm_rate)

    @property
    def schema(self) -> Any:
        """The columns: a name, the fields of an answer with only the class's probability, and an error."""
        names = self.description.evidence
        evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
        return pa.schema(
            [
                ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
                ("uncertainty", pa.float64()), ("risk", pa.float64()), ("reliable", pa.bool_()),
                ("accepted", pa.bool_()), ("evidence", evidence), ("alarm", pa.string()), ("error", pa.string()),
            ]
        )  # fmt: skip

    def __call__(self, images: Sequence[tuple[str, Array | str]]) -> list[dict[str, Any]]:
        """Return the rows of images by name, at most a batch; one that is a text, its error, has a row with that."""
        rows: list[dict[str, Any]] = [{"name": name} for name, _ in images]
        readable = [(row, image) for row, (_, image) in zip(rows, images, strict=True) if not isinstance(image, str)]
        for row, (_, image) in zip(rows, images, strict=True):
            if isinstance(image, str):
                row["error"] = image
        if readable:
            x = normalize_pixels(self.description, torch.from_numpy(np.stack([image for _, image in readable])))
            for (row, _), values in zip(readable, self.model.rows(x), strict=True):
                try:
                    fields = answer(self.description, self.threshold, values)
                    row |= {"probability": fields.pop("probabilities")[fields["class"]], **fields}
                except ResultError as error:
                    row["error"] = str(error)
        return rows
