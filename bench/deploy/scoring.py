"""Scoring many images: rate, memory, a kill on the way, and what a million would take.

``python -m bench.deploy.scoring --model MODEL.pt2 --data DIR`` writes the photographs to a folder as many JPEG files,
each several times under other names. It starts ``fastgrad score`` on the folder, kills it with SIGKILL when a third of
the parts is there, and starts it again. In the result every file has one row, and copies of a photograph one score.
``MODEL.pt2`` is a file for photographs with the default blocks, such as `bench.deploy.export` leaves in its cache.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import pages

#: Images in one part of the output, the most that a kill loses, and in one folder.
PART = 1000


def lay_out(root: Path, folder: Path, count: int) -> None:
    """Write ``count`` JPEG files of the photographs; copies differ only in their names."""
    with np.load(root / "imagenet-sample-256.npz") as stored:
        content, ends = stored["test_jpeg"].tobytes(), stored["test_offsets"].tolist()
    photographs = [content[start:stop] for start, stop in itertools.pairwise(ends)]
    for number in range(count):
        part, photograph = folder / f"{number // PART:04d}", number % len(photographs)
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{photograph:04d}-{number:07d}.jpg").write_bytes(photographs[photograph])


def run(command: Sequence[str | Path], parts: Path, until: int | None) -> tuple[float, list[tuple[int, float]]]:
    """Run to the end, or until ``until`` parts are there; return seconds, and pairs of finished parts and MiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    start, seen = time.perf_counter(), []
    while process.poll() is None:
        done = len(list(parts.glob("part-*.parquet")))
        # 0 if the process has just ended.
        pages_held = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        seen.append((done, pages_held * resource.getpagesize() / 2**20))
        if until is not None and done >= until:
            process.kill()
        time.sleep(0.5)
    if until is None and process.returncode:
        raise RuntimeError(f"fastgrad score ended with status {process.returncode}")
    return time.perf_counter() - start, [pair for pair in seen if pair[1]]


def measure(model: Path, data: Path, images: int) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "images", Path(name) / "scores"
        lay_out(data, folder, images)
        command = [sys.executable, "-m", "fastgrad", "score", model, folder, "--out", out, "--part", str(PART)]
        until = images // PART // 3
        _, first = run(command, out, until)
        kept = len(list(out.glob("part-*.parquet")))
        seconds, second = run(command, out, None)
        rows = pq.read_table(out).to_pylist()
        expected = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert kept >= until
    assert [row["name"] for row in rows] == expected, "a row is missing, doubled or out of order"
    assert not any(row["error"] for row in rows)
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        scores[Path(row["name"]).name[:4]].append(row["uncertainty"])
    # Memory after the first part of the second run and at its end.
    early = statistics.median(mib for done, mib in second if done == kept + 1)
    late = statistics.median(mib for done, mib in second if done == second[-1][0])
    yield {
        "images": images, "kept of the killed run": kept * PART,
        "images_per_s": (images - kept * PART) / seconds, "early_mib": early, "late_mib": late,
        "peak_mib": max(mib for _, mib in first + second),
        "apart": max(max(values) - min(values) for values in scores.values()),
    }  # fmt: skip


if __name__ == "__main__":
    given = {"type": Path, "required": True}
    pages.command(
        "scoring", __doc__, measure, packages=("torch", "pyarrow", "pillow"), model=given, data=given,
        images={"type": int, "default": 20_000},
    )  # fmt: skip
