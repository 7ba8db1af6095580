"""The web application: its routes and refusals."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastgrad import __version__
from fastgrad.checks import at_least, extra, is_a, is_path, lies_in
from fastgrad.deploy.serve.bodies import Limits, Readers
from fastgrad.deploy.serve.child import LOG, RequestError
from fastgrad.deploy.serve.guard import Guard, refusal
from fastgrad.deploy.serve.schema import Answer, refusals, request_body
from fastgrad.deploy.serve.served import Model
from fastgrad.deploy.serve.status import add_status_routes

with extra("serve"):
    import python_multipart  # noqa: F401 - needed by the processes that read bodies
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.routing import Match

# The page cannot load or run anything else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]], *, workers: int = 1,
    threads: int | None = None, decoders: int | None = None, max_batch: int = 32, batch_wait: float = 0.002,
    limits: Limits = Limits(), api_key: str | None = None, allowed_hosts: Collection[str] = (),  # noqa: B008 - frozen
    false_alarm_rate: float | None = None, drift_false_alarm_rate: float = 0.01,
    sha256: Collection[tuple[str, str]] = (),
) -> FastAPI:  # fmt: skip
    """Make the application that serves exported models.

    Files are copied to the temporary folder. ``app.state.reload.set()`` loads them again, as ``fastgrad serve`` does on
    SIGHUP: a changed file takes over when its processes are ready, and no request is lost. If it cannot be loaded, the
    previous one stays and the log says why.

    Args:
        path: The ``.pt2`` or ``.onnx``; or several by name, of which the first answers requests without a name.
        workers: Processes that run each model.
        threads: Compute threads of each process.
        decoders: Processes that read bodies; None for one per processor core, at most four.
        max_batch: Largest batch, no larger than the file allows.
        batch_wait: Seconds an idle worker waits for a batch to fill.
        limits: See `Limits`; those of connections and headers are enforced by ``fastgrad serve`` only.
        api_key: If given, all routes but the page, /health and /ready need it, as ``Authorization: Bearer KEY``.
        allowed_hosts: Names allowed in the ``Host`` of requests, in addition to ``localhost`` and addresses.
        false_alarm_rate: Share of in-distribution inputs to flag, one of the file's rates; None for the file's own.
        drift_false_alarm_rate: Bound on the probability of ever raising the drift alarm without drift.
        sha256: Pairs of a model's name and the SHA-256, in hexadecimal digits, of a file that it may be. A model
            without a pair may be any file.

    Raises:
        PackageError: A file is not an exported model, or ``sha256`` does not allow it.
        TypeError, ValueError: A file has no threshold for the rate, no request can carry the key, there is no model, a
            name fits no address, ``allowed_hosts`` is not a list, ``sha256`` has an unknown name or a bad digest, or an
            argument has a wrong type or is out of range.
    """
    for name, file in path.items() if isinstance(path, Mapping) else (("model", path),):
        is_path(path=file)
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
            raise ValueError(f"path must have names of letters, digits and _.-; one was {name!r}")
    paths = dict(path) if isinstance(path, Mapping) else {Path(path).stem: path}
    if not paths:
        raise ValueError("path must name at least one model; it was empty")
    given = {"workers": workers, "max_batch": max_batch, "threads": threads, "decoders": decoders}
    at_least(1, **{name: value for name, value in given.items() if value is not None})
    lies_in("[0, inf)", batch_wait=batch_wait)
    lies_in("(0, 1)", drift_false_alarm_rate=drift_false_alarm_rate)
    is_a(Limits, limits=limits)
    for name, digest in sha256:
        if name not in paths or not re.fullmatch("[0-9a-fA-F]{64}", digest):
            names = " or ".join(paths)
            raise ValueError(f"sha256 must pair {names} with 64 hexadecimal digits; one pair was {name!r}, {digest!r}")
    guard, models = Guard(api_key, allowed_hosts), {}
    for name, file in paths.items():
        models[name] = Model(
            name, Path(file), workers=workers, threads=threads, max_batch=max_batch, batch_wait=batch_wait,
            limits=limits, false_alarm_rate=false_alarm_rate, drift_false_alarm_rate=drift_false_alarm_rate,
            digests={digest.lower() for own, digest in sha256 if own == name},
        )  # fmt: skip
    first = next(iter(models.values()))
    readers = Readers(decoders or min(4, os.cpu_count() or 1), limits)

    def named(name: str | None) -> Model:
        if name is None:
            return first
        if name not in models:
            raise RequestError(404, f"the model must be one of {', '.join(models)}; it was {name[:80]!r}")
        return models[name]

    async def reload() -> None:
        while await app.state.reload.wait():
            app.state.reload.clear()
            await asyncio.gather(*(model.reload() for model in models.values()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.gather(readers.pool.start(), *(model.served.start() for model in models.values()))
        except Exception as error:
            LOG.error("the server cannot start: %s", str(error) or type(error).__name__)
            raise
        app.openapi()
        # Objects made so far stay; each garbage collection of them would block the event loop for a tenth of a second.
        gc.collect()
        gc.freeze()
        app.state.ready, reloading = True, asyncio.create_task(reload())
        yield
        app.state.ready = not reloading.cancel()
        await asyncio.gather(reloading, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in models.values()))
        await readers.pool.close()

    app = FastAPI(
        title="fastgrad", description="Classes of inputs, and whether to rely on them.", version=__version__,
        docs_url=None, redoc_url=None, lifespan=lifespan, responses=refusals(400, 401, 403, 411, 500),
    )  # fmt: skip
    app.state.ready = app.state.draining = False
    app.state.models, app.state.readers, app.state.reload = models, readers, asyncio.Event()
    app.add_middleware(guard.middleware, refused=lambda status: first.served.metrics.requests.labels(str(status)).inc())

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(405)
    async def other_methods(request: Request, error: HTTPException) -> JSONResponse:
        # The first route of a path knows only its own method.
        routes = [route for route in app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
        allowed = sorted({method for route in routes for method in getattr(route, "methods", ())})
        return JSONResponse({"detail": error.detail}, 405, {"Allow": ", ".join(allowed)})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(RequestError(422, f"{first['loc'][-1]}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        # The web server logs the error.
        return refusal(RequestError(500, "the server failed; its log says why"))

    described: dict[str, Any] = {
        "summary": "Class, probabilities, uncertainty and risk of one input",
        "responses": {200: {"model": Answer}, **refusals(404, 408, 413, 415, 422, 503, 504)},
        "openapi_extra": request_body(first.served.description.input_shape),
    }

    @app.post("/predict", **described)
    @app.post("/predict/{name}", **described)
    async def predict_route(request: Request, name: str | None = None) -> JSONResponse:
        start, status = time.perf_counter(), 500
        # One version of the file until the answer, even if another takes over meanwhile.
        with named(name).served.in_use() as served:
            try:
                if not app.state.ready:
                    raise RequestError(503, "the server is starting or shutting down")
                content = await readers.answer(request, served.description, served.threshold, served.run)
                served.metrics.observe(content)
                response, status = JSONResponse(content), 200
            except RequestError as error:
                response, status = refusal(error), error.status
            finally:
                served.metrics.latency.observe(time.perf_counter() - start)
                served.metrics.requests.labels(str(status)).inc()
            if app.state.draining:
                response.headers["Connection"] = "close"
            return response

    add_status_routes(app, named)
    page = Path(__file__).with_name("page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def page_route() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    return app
