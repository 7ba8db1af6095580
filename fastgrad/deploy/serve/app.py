"""The web application: its routes and refusals. It reads no body: it counts the bytes and hands them on."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastgrad.checks import at_least, extra, is_path, lies_in
from fastgrad.deploy.drift import DriftMonitor
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.serve.batcher import Batcher
from fastgrad.deploy.serve.bodies import Bodies
from fastgrad.deploy.serve.guard import LOG, Guard
from fastgrad.deploy.serve.pool import Version
from fastgrad.deploy.serve.process import Body, Refusal
from fastgrad.version import __version__

with extra("serve"):
    from anyio import fail_after
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.datastructures import MutableHeaders, State
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Hosts that always pass: the names of this machine.
LOCAL = ("localhost", "127.0.0.1", "[::1]")
# The page cannot load or run anything else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    path: str | os.PathLike[str], *, workers: int = 1, threads: int | None = None, max_batch: int = 32,
    max_queue: int = 256, max_body: int = 16 * 2**20, max_held: int = 64 * 2**20, max_pixels: int = MAX_PIXELS,
    timeout: float = 30.0, batch_timeout: float = 10.0, api_key: str | None = None,
    allowed_hosts: Collection[str] = (), false_alarm_rate: float | None = None, drift_false_alarm_rate: float = 0.01,
    sha256: Collection[str] = (),
) -> FastAPI:  # fmt: skip
    """Make the application that serves an exported model; run it with one process of a web server, such as uvicorn.

    The file is copied to the temporary folder. ``app.state.batcher.reload()`` loads it again, as ``fastgrad serve``
    does on SIGHUP: a changed file takes over when its processes are ready, and no request is lost. If it cannot be
    loaded, the previous one stays and the log says why. While ``app.state.draining`` is True, /ready answers 503, and
    answers close their connections.

    Args:
        path: The ``.pt2`` or ``.onnx``.
        workers: Processes that decode and answer.
        threads: Compute threads of each process; None for PyTorch's choice.
        max_batch: Largest batch, no larger than the file allows.
        max_queue: Requests to /predict in progress; more are answered 503 with Retry-After.
        max_body: Bytes of a request body; a larger one is answered 413.
        max_held: Bytes of all bodies in progress; more are answered 503.
        max_pixels: Pixels of an image; more are answered 413 before anything is decoded.
        timeout: Seconds from a request's headers to its answer; then 504.
        batch_timeout: Seconds in which a process must answer a batch; then it is replaced.
        api_key: If given, all routes but the page, /health and /ready need it, as ``Authorization: Bearer KEY``.
        allowed_hosts: Names and addresses allowed in the ``Host`` of requests, in addition to this machine's own;
            ``*.example.com`` allows all of a domain, ``*`` allows all.
        false_alarm_rate: Share of in-distribution inputs to flag, one of the file's rates; None for the file's own.
        drift_false_alarm_rate: Bound on the probability of ever raising the drift alarm without drift.
        sha256: SHA-256 of files that may be loaded, in hexadecimal digits; any file if there are none.

    Raises:
        PackageError: The file is not an exported model, has no threshold for the rate, or ``sha256`` does not allow it.
        TypeError, ValueError: No request can carry the key, or an argument has a wrong type or is out of range.
    """
    is_path(path=path)
    at_least(1, workers=workers, max_batch=max_batch, max_queue=max_queue, max_body=max_body, max_held=max_held,
             max_pixels=max_pixels, **({} if threads is None else {"threads": threads}))  # fmt: skip
    lies_in("(0, inf)", timeout=timeout, batch_timeout=batch_timeout)
    lies_in("(0, 1)", drift_false_alarm_rate=drift_false_alarm_rate)
    for digest in sha256:
        if not re.fullmatch("[0-9a-fA-F]{64}", str(digest)):
            raise ValueError(f"sha256 must hold texts of 64 hexadecimal digits; one was {digest!r}")
    guard, bodies = Guard(api_key), Bodies(max_queue, max_body, max_held)
    if isinstance(allowed_hosts, str) or not all(
        re.fullmatch(r"\*|(\*\.)?[\w.:\[\]-]+", str(name)) for name in allowed_hosts
    ):
        raise ValueError(f"allowed_hosts must be a list of names such as example.com; it was {allowed_hosts!r}")
    versions: dict[str, Any] = {
        "digests": {digest.lower() for digest in sha256},
        "drift_false_alarm_rate": drift_false_alarm_rate,
        "options": {"false_alarm_rate": false_alarm_rate, "max_pixels": max_pixels, "threads": threads},
    }
    first = Version(Path(path), workers=workers, **versions)
    batcher = Batcher(first, max_batch=max_batch, seconds=batch_timeout, **versions)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await batcher.start()
        except Exception as error:
            LOG.error("the server cannot start: %s", error)
            raise
        yield
        await batcher.stop()

    app = FastAPI(
        title="fastgrad", description="Classes of inputs, and whether to rely on them.", version=__version__,
        docs_url=None, redoc_url=None, lifespan=lifespan,
    )  # fmt: skip
    app.state.batcher, app.state.draining = batcher, False

    def count(status: int) -> None:
        batcher.version.metrics.requests.labels(str(status)).inc()

    app.add_middleware(guard.middleware, refused=count)
    app.add_middleware(_closing, state=app.state)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, *allowed_hosts], www_redirect=False)

    async def answered(request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "")
        try:
            with fail_after(timeout):
                async with bodies.read(request) as body:
                    version, found = await batcher.submit(Body(kind, body))
        except TimeoutError:
            raise HTTPException(504, f"no answer within {timeout:g} s") from None
        if isinstance(found, Refusal):
            raise HTTPException(found.status, found.reason)
        version.metrics.observe(found)
        return found

    @app.post("/predict", summary="Class, probabilities, uncertainty and risk of one input")
    async def predict(request: Request) -> JSONResponse:
        start, status = time.perf_counter(), 500
        try:
            response, status = JSONResponse(await answered(request)), 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            batcher.version.metrics.latency.observe(time.perf_counter() - start)
            count(status)
        return response

    @app.get("/health", summary="Whether the process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether to send requests here")
    async def ready() -> JSONResponse:
        fine = batcher.version.ready and not app.state.draining and not bodies.full
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    @app.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(batcher.version.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model", summary="The model's description: shape, labels, thresholds, scores")
    async def model() -> dict[str, Any]:
        version = batcher.version
        shown = ("input_shape", "labels", "classes", "histogram", "evidence", "risk", "risk_threshold")
        own = {"threshold": version.threshold, "false_alarm_rate": version.false_alarm_rate}
        return own | {field: getattr(version.description, field) for field in shown}

    def monitor() -> DriftMonitor:
        found = batcher.version.metrics.monitor
        if found is None:
            raise HTTPException(404, "the model's file has no scores to compare with")
        return found

    @app.get("/drift", summary="Whether inputs have drifted, and the estimated share of wrong answers")
    async def drift() -> dict[str, Any]:
        return monitor().state()

    @app.post("/drift", summary="Forget the inputs and the alarm; the log keeps the reason")
    async def reset_drift(
        action: Literal["reset"], reason: Annotated[str, Query(min_length=1, max_length=500, pattern=r"\S")]
    ) -> dict[str, Any]:
        monitor().reset()
        LOG.warning("drift: %s, because %r", action, reason)
        return monitor().state()

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    return app


def _closing(app: ASGIApp, state: State) -> ASGIApp:
    """Return ``app``; while the server drains, its answers close their connections."""

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start" and state.draining:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await app(scope, receive, closed)

    return closing
