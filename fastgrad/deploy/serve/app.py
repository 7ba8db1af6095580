"""The web application: routes, limits, and what each refusal says."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.checks import extra
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.serve.openapi import operation
from fastgrad.deploy.serve.pool import ModelError
from fastgrad.deploy.serve.requests import MAX_BODY, RequestError, read_input
from fastgrad.deploy.serve.served import Model, Served
from fastgrad.deploy.serve.traces import Trace, Traces

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

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
    path: str | Mapping[str, str],
    *,
    workers: int = 1,
    threads: int | None = None,
    max_batch: int = 32,
    batch_wait: float = 0.002,
    limits: Limits = Limits(),
    api_key: str | None = None,
    false_alarm_rate: float | None = None,
    drift_false_alarm_rate: float = 0.01,
    reload_every: float | None = 1.0,
    tracer_provider: TracerProvider | None = None,
) -> FastAPI:
    """Make the application that serves exported models.

    A file that changes takes over, without a request lost, once it is loaded and its processes are ready; where it
    cannot be loaded, the one before goes on and the log says why. Files are copied to the temporary folder.

    Args:
        path: the ``.pt2`` or ``.onnx``; or several by name, of which the first answers where no name is given.
        workers: processes that run each model.
        threads: compute threads of each process.
        max_batch: largest batch; at most the file's own.
        batch_wait: seconds an idle worker waits for a batch to fill.
        limits: see `Limits`.
        api_key: if given, /predict and /metrics need it, as ``X-API-Key: KEY`` or ``Authorization: Bearer
            KEY``.
        false_alarm_rate: share of in-distribution inputs to flag, one of the rates in the file; None: the
            file's own.
        drift_false_alarm_rate: bound on the probability of ever raising the drift alarm without drift.
        reload_every: seconds between two looks at the files; None never looks.
        tracer_provider: of OpenTelemetry, for the spans of requests to /predict; None makes none.

    Raises:
        PackageError: not an exported model.
        ValueError: the file has no threshold for that rate, an empty key, no model or a name that fits no address.
    """
    paths = {Path(path).stem: path} if isinstance(path, str) else dict(path)
    if not paths:
        raise ValueError("path must name at least one model; it was empty")
    if api_key is not None and not api_key:
        raise ValueError("api_key must not be empty")
    for name in paths if not isinstance(path, str) else ():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"path must have names of letters, digits and _.-; one was {name!r}")
    key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    def load(model: Model) -> Served:
        return Served(
            model.path,
            false_alarm_rate=false_alarm_rate,
            max_batch=max_batch,
            pool={
                "workers": workers,
                "threads": threads,
                "batch_wait": batch_wait,
                "hang_timeout": 2 * limits.seconds,
            },
            metrics={
                "drift_false_alarm_rate": drift_false_alarm_rate,
                "reloads": lambda: model.reloads,
                "reload_failures": lambda: model.failures,
            },
        )

    models = {name: Model(name, file, load) for name, file in paths.items()}
    first = next(iter(models.values()))
    traces = Traces(tracer_provider)

    def named(name: str | None) -> Model:
        if name is None:
            return first
        if name not in models:
            raise RequestError(404, f"the model must be one of {', '.join(models)}; it was {name[:80]!r}")
        return models[name]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in models.values():
            await model.served.pool.start()
        watching = [
            asyncio.create_task(model.watch(reload_every)) for model in models.values() if reload_every
        ]
        app.state.ready = True
        yield
        app.state.ready = False
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in models.values()))

    app = FastAPI(
        title="fastgrad", description="Class, uncertainty and whether to rely on it.", docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.state.ready, app.state.draining, app.state.active = False, False, 0
    app.state.models = models

    def authorize(request: Request) -> None:
        if key_digest is None:
            return
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("x-api-key") or bearer
        # Digests have one length, and compare_digest takes the same time wherever they differ.
        if not hmac.compare_digest(hashlib.sha256(given.encode()).digest(), key_digest):
            raise RequestError(401, "the API key is missing or wrong; send it as X-API-Key")

    async def predict(request: Request, served: Served, trace: Trace) -> dict[str, Any]:
        authorize(request)
        if not app.state.ready:
            raise RequestError(503, "the server is starting or shutting down")
        if app.state.active >= limits.queue:
            raise RequestError(503, "too many requests are waiting; try again in a moment")
        app.state.active += 1
        reading = True
        try:
            async with _timeout(limits.seconds):
                trace.stage("read")
                body = await _read_body(request, limits.body)
                reading = False
                trace.stage("decode")
                kind = request.headers.get("content-type", "")
                x = await read_input(kind, body, served.description, max_pixels=limits.pixels)
                trace.stage("queue")
                row = await served.pool.submit(x.numpy(), lambda size: trace.stage("run", batch_size=size))
            trace.stage("answer")
            result = answer(served.description, served.threshold, *row)
        except asyncio.TimeoutError:
            if reading:
                raise RequestError(408, f"the body did not arrive within {limits.seconds:g} s") from None
            raise RequestError(504, f"no answer within {limits.seconds:g} s") from None
        except ModelError as error:
            raise RequestError(500, str(error)) from None
        except ResultError as error:
            raise RequestError(422, str(error)) from None
        finally:
            app.state.active -= 1
        served.metrics.observe(result)
        return result

    async def respond(request: Request, name: str | None) -> Response:
        start = time.perf_counter()
        headers = {"Connection": "close"} if app.state.draining else {}
        route = "/predict" if name is None else "/predict/{name}"
        # One version of the file from here to the answer, whatever takes over meanwhile.
        with named(name).served.in_use() as served, traces.request(route, request.headers) as trace:
            try:
                status, content = 200, await predict(request, served, trace)
            except RequestError as error:
                status, content = error.status, {"detail": error.message}
                if status == 503:
                    headers["Retry-After"] = "1"
                if status == 401:
                    headers["WWW-Authenticate"] = "Bearer"
            served.metrics.latency.observe(time.perf_counter() - start)
            served.metrics.requests.labels(str(status)).inc()
            trace.answered(status)
            return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": error.message}, error.status)

    described: dict[str, Any] = {
        "summary": "Class, probabilities, uncertainty of one input",
        "openapi_extra": operation(first.served.description.input_shape),
    }

    @app.post("/predict", **described)
    async def predict_route(request: Request) -> Response:
        return await respond(request, None)

    @app.post("/predict/{name}", **described)
    async def predict_named_route(request: Request, name: str) -> Response:
        return await respond(request, name)

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether to send requests here")
    async def ready() -> JSONResponse:
        loaded = all(model.served.pool.ready for model in models.values())
        fine = app.state.ready and not app.state.draining and loaded and app.state.active < limits.queue
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    @app.get("/metrics", summary="For Prometheus")
    @app.get("/metrics/{name}", summary="For Prometheus, of one of several models")
    async def metrics_route(request: Request, name: str | None = None) -> Response:
        authorize(request)
        text = named(name).served.metrics.render()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get(
        "/model", summary="What travels with the model: shape, labels, threshold, in-distribution scores"
    )
    @app.get("/model/{name}", summary="The same of one of several models")
    async def model_route(name: str | None = None) -> dict[str, Any]:
        served = named(name).served
        return {
            "models": list(models),
            "input_shape": served.description.input_shape,
            "labels": served.description.labels,
            "classes": served.description.classes,
            "threshold": served.threshold,
            "false_alarm_rate": served.false_alarm_rate,
            "histogram": served.description.histogram,
            "evidence": served.description.evidence,
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
