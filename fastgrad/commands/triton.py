"""``fastgrad triton MODEL.onnx REPOSITORY``: a model's folder for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse

from fastgrad.deploy.triton_server import write_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.onnx)")
    parser.add_argument("repository", help="folder of the server's models")
    parser.add_argument("--name", help="of the model (default: the file's)")
    parser.add_argument("--version", type=int, default=1, help="of the model (1)")
    parser.add_argument("--max-batch", type=int, default=32, help="largest batch (32)")
    parser.add_argument(
        "--batch-wait-ms", type=float, default=2.0, help="how long a request may wait for others (2)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder; return the exit status."""
    folder = write_repository(
        args.model,
        args.repository,
        name=args.name,
        version=args.version,
        max_batch=args.max_batch,
        max_delay=args.batch_wait_ms / 1000,
    )
    print(f"written to {folder}; start with: tritonserver --model-repository={folder.parent.resolve()}")
    return 0
