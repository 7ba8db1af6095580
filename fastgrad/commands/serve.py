"""``fastgrad serve MODEL.pt2``: an exported model over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import math
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fastgrad.checks import extra, lies_in
from fastgrad.deploy.file.images import MAX_PIXELS

with extra("serve"):
    import uvicorn

#: Options that are arguments of `create_app`, in its units: name, type, default, help.
_OPTIONS = (
    ("workers", int, 1, "processes that decode and answer (1)"),
    ("threads", int, None, "compute threads of each process (default: PyTorch's)"),
    ("max_batch", int, 32, "largest batch (32)"),
    ("max_queue", int, 256, "requests in progress; more are answered 503 (256)"),
    ("max_pixels", int, MAX_PIXELS, "largest image in pixels; larger ones are answered 413 (10 million)"),
    ("timeout", float, 30.0, "seconds a request may take before it is answered 504 (30)"),
    ("batch_timeout", float, 10.0, "seconds a batch may take before its process is replaced (10)"),
    ("false_alarm_rate", float, None, "share of in-distribution inputs to flag (default: the file's own)"),
    ("drift_false_alarm_rate", float, 0.01,
     "bound on the probability of ever raising the drift alarm without drift (0.01)"),
)  # fmt: skip
#: Seconds after SIGTERM in which new connections are still accepted, while /ready sends load balancers elsewhere, and
#: in which those that were just made may send their request.
_LEAVE_SECONDS, _LAST_SECONDS = 1.0, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("model", help="file written by fastgrad.export (.pt2 or .onnx)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 chooses a free one (8000)")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="file with the key that requests must carry (default: the variable FASTGRAD_API_KEY, or no key)",
    )  # fmt: skip
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="name allowed in the Host of requests, besides --host and localhost; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--sha256", action="append", default=[], metavar="HEX",
        help="load only a file with this SHA-256; may be given several times",
    )  # fmt: skip
    parser.add_argument("--max-body-mb", type=float, default=16.0, help="largest body in MiB (16)")
    parser.add_argument(
        "--drain-seconds", type=float, default=25.0, help="seconds from SIGTERM to the end, even without answers (25)"
    )
    for name, kind, default, text in _OPTIONS:
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then answer what was accepted; return the status. SIGHUP reloads the file."""
    from fastgrad.deploy.serve.app import create_app

    if not 0 <= args.port <= 65_535:
        raise ValueError(f"--port must be from 0 to 65535; it was {args.port}")
    lies_in("(0, inf)", max_body_mb=args.max_body_mb, drain_seconds=args.drain_seconds)
    file = args.api_key_file
    key = os.environ.pop("FASTGRAD_API_KEY", None)  # not for the processes of the pool
    key = key if file is None else file.read_text("utf-8-sig", "replace").strip()
    body = math.ceil(args.max_body_mb * 2**20)
    app = create_app(
        args.model, api_key=key, allowed_hosts=[args.host, *args.allowed_host], sha256=args.sha256, max_body=body,
        max_held=max(64 * 2**20, 3 * body), **{name: getattr(args, name) for name, *_ in _OPTIONS},
    )  # fmt: skip
    if key is None and not _is_loopback(args.host):
        warning = f"listening on {args.host} without an API key; anyone who reaches it can use it"
        print(f"fastgrad serve: {warning}", file=sys.stderr)
    config = uvicorn.Config(
        app, host=args.host, port=args.port, loop="asyncio", http="h11", ws="none", access_log=False,
        server_header=False, log_level="info", proxy_headers=False,
        # Above that of proxies, which would otherwise use connections that are just being closed.
        timeout_keep_alive=75, h11_max_incomplete_event_size=16 * 2**10, limit_concurrency=512,
        timeout_graceful_shutdown=max(1, math.ceil(args.drain_seconds - _LEAVE_SECONDS - _LAST_SECONDS)),
    )  # fmt: skip
    server = Server(config)
    # When uvicorn ends, it raises the signal again for the previous handler.
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Reloads the model's file on SIGHUP, and gives load balancers time to notice its end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._state: Any = config.app.state  # type: ignore[union-attr]
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and listen to SIGHUP."""
        await super().startup(sockets)
        if self.started and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        task = asyncio.create_task(self._state.batcher.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; connections that were made are answered before."""
        self._state.draining = True
        await asyncio.sleep(_LEAVE_SECONDS)
        await self._accept_no_more()
        await asyncio.sleep(_LAST_SECONDS)
        await super().shutdown(sockets)

    async def _accept_no_more(self) -> None:
        """Close the listening sockets; accept before what waits in their queues, which the system would reset."""
        accepted: list[socket.socket] = []
        for listening in self.servers:
            queues = [queue.dup() for queue in listening.sockets]
            listening.close()
            for queue in queues:
                with queue, contextlib.suppress(OSError):  # none waits
                    while True:
                        accepted.append(queue.accept()[0])
        made_by = self.config.http_protocol_class
        make = partial(made_by, self.config, self.server_state, self.lifespan.state)  # type: ignore[call-arg]
        for connection in accepted:
            await asyncio.get_running_loop().connect_accepted_socket(make, connection)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
