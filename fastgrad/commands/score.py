"""``fastgrad score MODEL IMAGES --out scores``: one row per image, readable or not."""

from __future__ import annotations

import argparse
import sys

from fastgrad.deploy.dataset import MAX_BYTES
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.score import score

#: Options that are arguments of `score`: type, default, help.
_OPTIONS = {
    "batch": (int, 64, "images in one run of the model (64)"),
    "part": (int, 4096, "images in one part, the most that a stopped run loses (4096)"),
    "false_alarm_rate": (float, None, "share of in-distribution images to flag (the file's own)"),
    "image_column": (str, None, "column of images in the Parquet file (default: image, img, bytes or content)"),
    "key_column": (str, None, "column with the names of the rows (default: path, name or id)"),
    "max_pixels": (int, MAX_PIXELS, "largest image to decode (10 million)"),
    "max_bytes": (int, MAX_BYTES, "largest file or cell to read (64 MiB)"),
    "workers": (int, None, "processes that decode images (default: one per core)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.pt2 or .onnx)")
    parser.add_argument("images", help="folder of images, or a Parquet file with a column of image bytes")
    parser.add_argument("--out", required=True, help="folder of Parquet files to write, together one row per image")
    for name, (kind, default, text) in _OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)


def run(args: argparse.Namespace) -> int:
    """Score, and print the counts; return the exit status."""
    options = {name: getattr(args, name) for name in _OPTIONS}
    try:
        counts = score(args.model, args.images, args.out, progress=True, **options)
    except KeyboardInterrupt:
        print("fastgrad score: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(", ".join(f"{value} {key}" for key, value in counts.items()) + f"; written to {args.out}")
    return 0
