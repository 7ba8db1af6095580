"""The web application: routes, limits, and what each refusal says."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.images import MAX_PIXELS
from fastgrad.deploy.package import read_description
from fastgrad.deploy.serve.metrics import Metrics
from fastgrad.deploy.serve.pool import ModelError, WorkerPool
from fastgrad.deploy.serve.requests import MAX_BODY, RequestError, answer, read_input

with extra("serve"):
    import python_multipart  # noqa: F401 - starlette reads forms with it
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.requests import ClientDisconnect

# A body that is too large is read on and thrown away up to here, so that the client gets to read the refusal.
_DISCARD = 256 * 2**20
# The page is one file; nothing it shows can load or run anything else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        body: bytes of a request body; more is answered 413.
        pixels: of an image; more is answered 413, before anything is decoded.
        queue: requests to /predict in progress at once; more are answered 503 with Retry-After.
        seconds: from the first byte of a request to its answer; then 504 (408 if the body never came).
    """

    body: int = MAX_BODY
    pixels: int = MAX_PIXELS
    queue: int = 256
    seconds: float = 30.0


def create_app(
    path: str,
    *,
    workers: int = 1,
    threads: int | None = None,
    max_batch: int = 32,
    batch_wait: float = 0.002,
    limits: Limits = Limits(),
    api_key: str | None = None,
    false_alarm_rate: float | None = None,
    drift_false_alarm_rate: float = 0.01,
) -> FastAPI:
    """Make the application that serves one exported model.

    Args:
        path: the ``.pt2``.
        workers: processes that run the model.
        threads: compute threads of each.
        max_batch: largest batch; at most the file's own.
        batch_wait: seconds an idle worker waits for a batch to fill.
        limits: see `Limits`.
        api_key: if given, /predict and /metrics need it, as ``X-API-Key: KEY`` or ``Authorization: Bearer
            KEY``.
        false_alarm_rate: share of in-distribution inputs to flag, one of the rates in the file; None: the
            file's own.
        drift_false_alarm_rate: bound on the probability of ever raising the drift alarm without drift.

    Raises:
        PackageError: not an exported model.
        ValueError: the file has no threshold for that rate, or an empty key.
    """
    description = read_description(path)
    threshold = description.threshold_at(false_alarm_rate)
    if api_key is not None and not api_key:
        raise ValueError("api_key must not be empty")
    key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
    pool = WorkerPool(
        path,
        workers=workers,
        threads=threads,
        max_batch=min(max_batch, description.max_batch),
        batch_wait=batch_wait,
        hang_timeout=2 * limits.seconds,
        on_batch=lambda size: metrics.batch_size.observe(size),
    )
    metrics = Metrics(
        description,
        false_alarm_rate=None if threshold is None else false_alarm_rate or description.false_alarm_rate,
        drift_false_alarm_rate=drift_false_alarm_rate,
        queue_length=lambda: pool.queued,
        restarts=lambda: pool.restarts,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await pool.close()

    app = FastAPI(
        title="fastgrad", description="Class, uncertainty and whether to rely on it.", docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.state.ready, app.state.draining, app.state.active = False, False, 0
    app.state.pool, app.state.metrics = pool, metrics

    def authorize(request: Request) -> None:
        if key_digest is None:
            return
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("x-api-key") or bearer
        # Digests have one length, and compare_digest takes the same time wherever they differ.
        if not hmac.compare_digest(hashlib.sha256(given.encode()).digest(), key_digest):
            raise RequestError(401, "the API key is missing or wrong; send it as X-API-Key")

    async def predict(request: Request) -> dict[str, Any]:
        authorize(request)
        if not app.state.ready:
            raise RequestError(503, "the server is starting or shutting down")
        if app.state.active >= limits.queue:
            raise RequestError(503, "too many requests are waiting; try again in a moment")
        app.state.active += 1
        reading = True
        try:
            async with _timeout(limits.seconds):
                body = await _read_body(request, limits.body)
                reading = False
                x = await read_input(
                    request.headers.get("content-type", ""), body, description, max_pixels=limits.pixels
                )
                probabilities, uncertainty = await pool.submit(x.numpy())
            result = answer(description, threshold, probabilities, uncertainty)
        except asyncio.TimeoutError:
            if reading:
                raise RequestError(408, f"the body did not arrive within {limits.seconds:g} s") from None
            raise RequestError(504, f"no answer within {limits.seconds:g} s") from None
        except ModelError as error:
            raise RequestError(500, str(error)) from None
        finally:
            app.state.active -= 1
        metrics.observe(result)
        return result

    @app.post(
        "/predict",
        summary="Class, probabilities, uncertainty of one input",
        openapi_extra=_operation(description.input_shape),
    )
    async def predict_route(request: Request) -> Response:
        start = time.perf_counter()
        headers = {"Connection": "close"} if app.state.draining else {}
        try:
            status, content = 200, await predict(request)
        except RequestError as error:
            status, content = error.status, {"detail": error.message}
            if status == 503:
                headers["Retry-After"] = "1"
            if status == 401:
                headers["WWW-Authenticate"] = "Bearer"
        metrics.latency.observe(time.perf_counter() - start)
        metrics.requests.labels(str(status)).inc()
        return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether to send requests here")
    async def ready() -> JSONResponse:
        fine = app.state.ready and not app.state.draining and pool.ready and app.state.active < limits.queue
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    @app.get("/metrics", summary="For Prometheus")
    async def metrics_route(request: Request) -> Response:
        try:
            authorize(request)
        except RequestError as error:
            return JSONResponse({"detail": error.message}, error.status)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get(
        "/model", summary="What travels with the model: shape, labels, threshold, in-distribution scores"
    )
    async def model_route() -> dict[str, Any]:
        return {
            "input_shape": description.input_shape,
            "labels": description.labels,
            "classes": description.classes,
            "threshold": threshold,
            "false_alarm_rate": false_alarm_rate or description.false_alarm_rate,
            "histogram": description.histogram,
            "needs_key": key_digest is not None,
        }

    page = (files("fastgrad.deploy.serve") / "page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def page_route() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    return app


async def _read_body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > limit
    size = 0
    parts: list[bytes] = []
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                too_large = True
                parts.clear()
            if not too_large:
                parts.append(part)
            elif size > _DISCARD:
                break
    except ClientDisconnect:
        raise RequestError(400, "the connection closed before the whole body came") from None
    if too_large:
        raise RequestError(413, f"the body is too large; at most {limit} bytes are allowed")
    if not size:
        raise RequestError(400, "the body is empty")
    return b"".join(parts)


@asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, which Python 3.10 lacks."""
    task, expired = asyncio.current_task(), False
    assert task is not None

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()


def _operation(shape: tuple[int, ...]) -> dict[str, Any]:
    """The part of the OpenAPI description that cannot be read off a signature."""
    image = {"schema": {"type": "string", "format": "binary"}}
    number_list = {
        "type": "array",
        "items": {},
        "description": f"nested lists of numbers, shape {list(shape)}",
    }
    error = {
        "description": "Refused; `detail` says why",
        "content": {
            "application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}
        },
    }
    result = {
        "type": "object",
        "required": ["class", "label", "probabilities", "uncertainty", "reliable"],
        "properties": {
            "class": {"type": "integer"},
            "label": {"type": ["string", "null"]},
            "probabilities": {"type": "array", "items": {"type": "number"}},
            "uncertainty": {"type": "number", "description": "higher = less reliable"},
            "reliable": {"type": ["boolean", "null"], "description": "uncertainty at most the threshold"},
        },
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "image/*": image,
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": image["schema"]},
                    }
                },
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {"inputs": number_list},
                    }
                },
            },
        },
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {"schema": result}}},
            **dict.fromkeys(("400", "401", "408", "413", "415", "422", "500", "503", "504"), error),
        },
    }
