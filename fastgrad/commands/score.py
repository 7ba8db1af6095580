"""``fastgrad score MODEL IMAGES --out scores.parquet``: one row per image, readable or not."""

from __future__ import annotations

import argparse
import sys

from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.score.local import score
from fastgrad.deploy.score.sources import MAX_BYTES

#: Options that are arguments of both functions that score: type, default, help.
_OPTIONS = {
    "batch": (int, 64, "images in one run of the model (64)"),
    "part": (int, 4096, "images in one part, the most that a stopped run loses (4096)"),
    "false_alarm_rate": (float, None, "share of in-distribution images to flag (the file's own)"),
    "image_column": (str, None, "column of images in the Parquet file (default: image, img, bytes or content)"),
    "key_column": (str, None, "column with the names of the rows (default: path, name or id)"),
    "max_pixels": (int, MAX_PIXELS, "largest image to decode (10 million)"),
    "max_bytes": (int, MAX_BYTES, "largest file or cell to read (64 MiB)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.pt2 or .onnx)")
    parser.add_argument("images", help="folder of images, or a Parquet file with a column of image bytes")
    parser.add_argument("--out", required=True, help="Parquet file to write, with one row per image")
    for name, (kind, default, text) in _OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model, with --ray (1)")
    parser.add_argument("--ray", action="store_true", help="use a Ray cluster; --out is then a folder of parts")


def run(args: argparse.Namespace) -> int:
    """Score, and print the counts; return the exit status."""
    options = {name: getattr(args, name) for name in _OPTIONS}
    if args.workers != 1 and not args.ray:
        raise ValueError(f"--workers needs --ray; without it one process scores, and it was {args.workers}")
    try:
        if args.ray:
            from fastgrad.deploy.score.ray import score_dataset

            counts = score_dataset(args.model, args.images, args.out, workers=args.workers, **options)
        else:
            counts = score(args.model, args.images, args.out, progress=True, **options)
    except KeyboardInterrupt:
        print("fastgrad score: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(", ".join(f"{value} {key}" for key, value in counts.items()) + f"; written to {args.out}")
    return 0
