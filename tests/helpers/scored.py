"""Jobs of scoring, and the tables that they write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fastgrad.deploy.file.package import read_description
from fastgrad.deploy.score.job import Job

OPTIONS: dict[str, Any] = {"batch": 4, "false_alarm_rate": None, "max_pixels": 100, "max_bytes": 10**6}


def table(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def errors(path: Path) -> dict[str, str | None]:
    return {row["name"]: row["error"] for row in table(path)}


def begin(model: Path, images: Path, folder: Path, part: int = 4, **changes: Any) -> Job:
    """A job whose parts lie in this folder; the description may be changed."""
    description = dataclasses.replace(read_description(model), **changes)
    columns = (None, None)
    return Job(model, description, images, folder, folder.with_suffix(""), part=part, columns=columns, **OPTIONS)
