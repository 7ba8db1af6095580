"""``fastgrad score MODEL IMAGES --out scores.parquet``: one row an image, whatever the image."""

from __future__ import annotations

import argparse
import sys

from fastgrad.deploy.file.package import PackageError
from fastgrad.deploy.score.job import Limits
from fastgrad.deploy.score.local import score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.pt2 or .onnx)")
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
        "--max-pixels", type=int, default=Limits().pixels, help="largest image to decode (10 million)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=Limits().size, help="largest file or cell to read (64 MiB)"
    )
    parser.add_argument(
        "--ray", action="store_true", help="on a Ray cluster: --out is then a folder of parts"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="with --ray: processes that hold the model (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Score, and say what there was; return the exit status."""
    options = {
        "batch": args.batch, "part": args.part, "false_alarm_rate": args.false_alarm_rate,
        "image_column": args.image_column, "key_column": args.key_column, "max_pixels": args.max_pixels,
        "max_bytes": args.max_bytes,
    }  # fmt: skip
    try:
        if args.ray:
            from fastgrad.deploy.score.ray import score_dataset

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
