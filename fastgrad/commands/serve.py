"""``fastgrad serve MODEL.pt2``: exported models over HTTP."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from fastgrad.deploy.file.images import MAX_PIXELS

#: Options that take a value: name, type, default, help.
_OPTIONS = (
    ("--api-key-file", Path, None,
     "file with the key that requests must carry (default: the variable FASTGRAD_API_KEY, or no key)"),
    ("--host", str, "127.0.0.1", "address to listen on (default: this machine only)"),
    ("--port", int, 8000, "port; 0 chooses a free one (8000)"),
    ("--batch-wait-ms", float, 2.0, "milliseconds an idle worker waits for a batch to fill (2)"),
    ("--false-alarm-rate", float, None, "share of in-distribution inputs to flag (default: the file's own)"),
    ("--drift-false-alarm-rate", float, 0.01,
     "bound on the probability of ever raising the drift alarm without drift (0.01)"),
)  # fmt: skip
#: The same for options whose value must be positive.
_POSITIVE = (
    ("--workers", int, 1, "processes that run the model (default: 1)"),
    ("--threads", int, None, "compute threads of each process (default: PyTorch's)"),
    ("--decoders", int, None, "processes that read bodies (default: one per core, at most 4)"),
    ("--max-batch", int, 32, "largest batch (default: 32)"),
    ("--max-queue", int, 256, "requests in progress; more are answered 503 (256)"),
    ("--timeout", float, 30.0, "seconds a request may take before it is answered 504 (30)"),
    ("--drain-seconds", float, 25.0, "seconds from SIGTERM to the end, even if answers are missing (25)"),
    ("--max-body-mb", float, 16.0, "largest body in MiB; larger ones are answered 413 (16)"),
    ("--max-model-mb", float, 1024.0, "largest model file in MiB (1024)"),
    ("--max-pixels", int, MAX_PIXELS, "largest image in pixels; larger ones are answered 413 (10 million)"),
    ("--max-connections", int, 512,
     "open connections; beyond, the longest-waiting one is closed (512, or what open files allow)"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", nargs="?", help="file written by fastgrad.export (.pt2 or .onnx)")
    parser.add_argument(
        "--model", dest="models", action="append", default=[], metavar="NAME=PATH",
        help="a file that answers at /predict/NAME; may be given several times, and the first also answers at /predict",
    )  # fmt: skip
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="name allowed in the Host of requests, besides localhost and addresses; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--sha256", action="append", default=[], metavar="NAME=HEX",
        help="accept only a file with this SHA-256 for the model NAME (that of MODEL is its file name without suffix); "
        "may be given several times, also for one model",
    )  # fmt: skip
    for name, kind, default, text in (*_OPTIONS, *_POSITIVE):
        parser.add_argument(name, type=kind, default=default, help=text)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then answer what was accepted; return the status. SIGHUP reloads the files."""
    from fastgrad.deploy.serve.app import create_app
    from fastgrad.deploy.serve.bodies import Limits
    from fastgrad.deploy.serve.child import ignore_signals
    from fastgrad.deploy.serve.guard import address_of
    from fastgrad.deploy.serve.server import Server

    for name, *_ in _POSITIVE:
        value = getattr(args, name[2:].replace("-", "_"))
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite; it was {value:g}")
    for name, value, most in (("--port", args.port, 65_535), ("--batch-wait-ms", args.batch_wait_ms, 60_000)):
        if not 0 <= value <= most:
            raise ValueError(f"{name} must be from 0 to {most}; it was {value:g}")
    body = math.ceil(args.max_body_mb * 2**20)
    limits = Limits(
        body=body, pixels=args.max_pixels, queue=args.max_queue, seconds=args.timeout,
        memory=max(Limits.memory, 3 * body), connections=args.max_connections, drain_seconds=args.drain_seconds,
        file=math.ceil(args.max_model_mb * 2**20),
    )  # fmt: skip
    file = args.api_key_file
    key = os.environ.get("FASTGRAD_API_KEY") if file is None else file.read_text("utf-8-sig", "replace").strip()
    app = create_app(
        _paths(args.model, args.models), workers=args.workers, threads=args.threads, decoders=args.decoders,
        max_batch=args.max_batch, batch_wait=args.batch_wait_ms / 1000, limits=limits, api_key=key,
        allowed_hosts=[*args.allowed_host, args.host], false_alarm_rate=args.false_alarm_rate,
        drift_false_alarm_rate=args.drift_false_alarm_rate,
        sha256=[(name, digits) for name, _, digits in (pair.rpartition("=") for pair in args.sha256)],
    )  # fmt: skip
    address = address_of(args.host)
    if key is None and not (args.host == "localhost" if address is None else address.is_loopback):
        warning = f"listening on {args.host} without an API key; anyone who reaches it can use it"
        print(f"fastgrad serve: {warning}", file=sys.stderr)
    server = Server(app, host=args.host, port=args.port, limits=limits)
    # When uvicorn ends, it raises the signal again for the previous handler.
    ignore_signals("SIGTERM", "SIGHUP", "SIGBREAK")
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


def _paths(model: str | None, named: list[str]) -> str | dict[str, str]:
    """Return the only file, or all files by name."""
    if (model is None) == (not named):
        raise ValueError("give one MODEL, or --model NAME=PATH as often as there are models")
    if model is not None:
        return model
    paths: dict[str, str] = {}
    for pair in named:
        name, equals, path = pair.partition("=")
        if not (name and equals and path) or name in paths:
            raise ValueError(f"--model must be NAME=PATH, each name once; it was {pair!r}")
        paths[name] = path
    return paths
