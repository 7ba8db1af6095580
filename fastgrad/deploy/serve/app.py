"""The web application: routes, and what each refusal says."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad import __version__
from fastgrad.checks import at_least, extra, is_a, is_path, lies_in
from fastgrad.deploy.file.package import PackageError
from fastgrad.deploy.serve.bodies import Limits, Readers
from fastgrad.deploy.serve.child import ChildError, RequestError
from fastgrad.deploy.serve.guard import Guard, refusal
from fastgrad.deploy.serve.schema import Answer, refusals, request_body
from fastgrad.deploy.serve.served import Model, Served
from fastgrad.deploy.serve.status import add_status_routes
from fastgrad.deploy.serve.traces import Trace

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

with extra("serve"):
    import python_multipart  # noqa: F401 - the processes that read bodies need it
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.routing import Match

# The page is one file; nothing it shows can load or run anything else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    workers: int = 1,
    threads: int | None = None,
    decoders: int | None = None,
    max_batch: int = 32,
    batch_wait: float = 0.002,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    false_alarm_rate: float | None = None,
    drift_false_alarm_rate: float = 0.01,
    pins: str | os.PathLike[str] | None = None,
    reload_every: float = 1.0,
    tracer_provider: TracerProvider | None = None,
) -> FastAPI:
    """Make the application that serves exported models.

    Exported files hold native code, so none is loaded again unless ``pins`` names its digest. Then a changed file takes
    over once its processes are ready, and no request is lost. If it cannot be loaded, the previous one stays and the
    log says why. Files are copied to the temporary folder.

    Args:
        path: the ``.pt2`` or ``.onnx``; or several by name, of which the first answers requests without a name.
        workers: processes that run each model.
        threads: compute threads of each process.
        decoders: processes that read bodies; None: one per processor core, at most four.
        max_batch: largest batch; at most the file's own.
        batch_wait: seconds an idle worker waits for a batch to fill.
        limits: see `Limits`; those of connections and headers are enforced by ``fastgrad serve``.
        api_key: if given, all routes but the page, /health and /ready need it, as ``Authorization: Bearer KEY``.
        allowed_hosts: names that requests may have in ``Host``, beside ``localhost`` and addresses.
        false_alarm_rate: share of in-distribution inputs to flag, one of the rates in the file; None: the
            file's own.
        drift_false_alarm_rate: bound on the probability of ever raising the drift alarm without drift.
        pins: a file with the SHA-256 of each model file that may be loaded, one per line, as ``sha256sum`` writes them.
            Keep it where writers of model files cannot write. None: no file is loaded after the start.
        reload_every: seconds between two looks at the files, with ``pins``.
        tracer_provider: OpenTelemetry's, for the spans of requests to /predict; None makes no spans.

    Raises:
        PackageError: not an exported model, or one that ``pins`` does not name.
        TypeError, ValueError: the file has no threshold for that rate, no request can carry the key, there is no model,
            a name fits no address, ``allowed_hosts`` is no list, or an argument has a wrong type or is out of range.
    """
    for name, file in path.items() if isinstance(path, Mapping) else (("model", path),):
        is_path(path=file)
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
            raise ValueError(f"path must have names of letters, digits and _.-; one was {name!r}")
    paths = dict(path) if isinstance(path, Mapping) else {Path(path).stem: path}
    if not paths:
        raise ValueError("path must name at least one model; it was empty")
    given = {name: value for name, value in (("decoders", decoders), ("threads", threads)) if value is not None}
    at_least(1, workers=workers, max_batch=max_batch, **given)
    lies_in("[0, inf)", batch_wait=batch_wait)
    lies_in("(0, inf]", reload_every=reload_every)
    lies_in("(0, 1)", drift_false_alarm_rate=drift_false_alarm_rate)
    guard = Guard(api_key, allowed_hosts)
    if pins is not None:
        is_path(pins=pins)
    is_a(Limits, limits=limits)
    load = functools.partial(
        Served, workers=workers, threads=threads, max_batch=max_batch, batch_wait=batch_wait, limits=limits,
        false_alarm_rate=false_alarm_rate, drift_false_alarm_rate=drift_false_alarm_rate, pins=pins,
    )  # fmt: skip
    models = {name: Model(name, Path(file), load) for name, file in paths.items()}
    first = next(iter(models.values()))
    tracer = None if tracer_provider is None else tracer_provider.get_tracer("fastgrad.serve")
    readers = Readers(decoders or min(4, os.cpu_count() or 1), limits)

    def named(name: str | None) -> Model:
        if name is None:
            return first
        if name not in models:
            raise RequestError(404, f"the model must be one of {', '.join(models)}; it was {name[:80]!r}")
        return models[name]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.gather(readers.start(), *(model.served.start() for model in models.values()))
        except (ChildError, PackageError) as error:
            app.state.failure = f"the server cannot start: {error}"
            raise
        watching = [asyncio.create_task(model.watch(reload_every)) for model in models.values() if pins is not None]
        app.openapi()
        # Objects made so far stay; each garbage collection of them would stop the event loop for a tenth of a second.
        gc.collect()
        gc.freeze()
        app.state.ready = True
        yield
        app.state.ready = False
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in models.values()))
        await readers.close()

    app = FastAPI(
        title="fastgrad", description="Class, uncertainty and whether to rely on it.", version=__version__,
        docs_url=None, redoc_url=None, lifespan=lifespan, responses=refusals(400, 401, 403, 500),
    )  # fmt: skip
    app.state.ready, app.state.draining, app.state.failure = False, False, None
    app.state.models, app.state.readers = models, readers
    app.add_middleware(guard.middleware, refused=lambda status: first.served.metrics.requests.labels(str(status)).inc())

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(405)
    async def other_methods(request: Request, error: HTTPException) -> JSONResponse:
        # The first route of a path knows only its own method.
        partial = [route for route in app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
        allowed = sorted({method for route in partial for method in getattr(route, "methods", ())})
        return JSONResponse({"detail": error.detail}, 405, {"Allow": ", ".join(allowed)})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(RequestError(422, f"{first['loc'][-1]}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        # The web server writes the error to the log.
        return refusal(RequestError(500, "the server failed; its log says why"))

    described: dict[str, Any] = {
        "summary": "Class, probabilities, uncertainty and risk of one input",
        "responses": {200: {"model": Answer}, **refusals(404, 408, 413, 415, 422, 503, 504)},
        "openapi_extra": request_body(first.served.description.input_shape),
    }

    @app.post("/predict", **described)
    @app.post("/predict/{name}", **described)
    async def predict_route(request: Request, name: str | None = None) -> JSONResponse:
        start = time.perf_counter()
        # One version of the file from here to the answer, even if another takes over meanwhile.
        with named(name).served.in_use() as served, Trace(tracer, request) as trace:

            async def run(value: bytes) -> np.ndarray[Any, Any]:
                return np.frombuffer(await served.pool.submit((value,), lambda n: trace.stage("run", batch_size=n)))

            try:
                if not app.state.ready:
                    raise RequestError(503, "the server is starting or shutting down")
                content = await readers.answer(request, served.description, served.threshold, run, trace.stage)
                served.metrics.observe(content)
                response, trace.status = JSONResponse(content), 200
            except RequestError as error:
                response, trace.status = refusal(error), error.status
            finally:
                served.metrics.latency.observe(time.perf_counter() - start)
                served.metrics.requests.labels(str(trace.status)).inc()
            if app.state.draining:
                response.headers["Connection"] = "close"
            return response

    add_status_routes(app, named)
    page = Path(__file__).with_name("page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def page_route() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    return app
