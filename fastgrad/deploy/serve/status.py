"""Routes for the state of the server and its models: health, readiness, metrics, the model, drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastgrad.checks import extra
from fastgrad.deploy.drift import DriftMonitor
from fastgrad.deploy.serve.child import LOG, RequestError
from fastgrad.deploy.serve.schema import Status, refusals
from fastgrad.deploy.serve.served import Model

with extra("serve"):
    from fastapi import FastAPI, Query
    from fastapi.responses import JSONResponse, Response


def add_status_routes(app: FastAPI, named: Callable[[str | None], Model]) -> None:
    """Add the routes; ``named`` returns the model of a name, or the first."""
    state, models, readers = app.state, app.state.models, app.state.readers

    @app.get("/health", summary="Whether the process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether to send requests here", responses={n: {"model": Status} for n in (200, 503)})
    async def ready() -> JSONResponse:
        loaded = all(model.served.pool.ready for model in models.values())
        fine = state.ready and not state.draining and loaded and readers.active < readers.limits.queue
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    text: dict[int | str, Any] = {200: {"content": {"text/plain": {}}}, **refusals(404)}

    @app.get("/metrics", summary="For Prometheus", response_class=Response, responses=text)
    @app.get("/metrics/{name}", summary="The same of one of several models", response_class=Response, responses=text)
    async def metrics_route(name: str | None = None) -> Response:
        return Response(named(name).served.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    described: dict[str, Any] = {"responses": refusals(404)}

    @app.get("/model", summary="The model's description: shape, labels, thresholds, scores", **described)
    @app.get("/model/{name}", summary="The same of one of several models", **described)
    async def model_route(name: str | None = None) -> dict[str, Any]:
        served = named(name).served
        shown = ("input_shape", "labels", "classes", "histogram", "evidence", "risk", "risk_threshold")
        own = {"models": list(models), "threshold": served.threshold, "false_alarm_rate": served.false_alarm_rate}
        return own | {field: getattr(served.description, field) for field in shown}

    def monitor_of(name: str | None) -> DriftMonitor:
        monitor = named(name).served.metrics.monitor
        if monitor is None:
            raise RequestError(404, "the model's file has no scores to compare with")
        return monitor

    @app.get("/drift", summary="Whether inputs have drifted, and the estimated share of wrong answers", **described)
    @app.get("/drift/{name}", summary="The same of one of several models", **described)
    async def drift_route(name: str | None = None) -> dict[str, Any]:
        return monitor_of(name).state()

    @app.post(
        "/drift", summary="Forget the inputs and the alarm; the log keeps the reason", responses=refusals(404, 422)
    )
    @app.post("/drift/{name}", summary="The same of one of several models", responses=refusals(404, 422))
    async def drift_reset_route(
        action: Literal["reset"],
        reason: Annotated[str, Query(min_length=1, max_length=500, pattern=r"\S")],
        name: str | None = None,
    ) -> dict[str, Any]:
        monitor = monitor_of(name)
        monitor.reset()
        LOG.warning("drift: %s, because %r", action, reason)
        return monitor.state()
