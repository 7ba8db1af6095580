"""Routes for the state of the server and its models: health, readiness, metrics, the model, drift."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastgrad.checks import extra
from fastgrad.deploy.drift import DriftMonitor
from fastgrad.deploy.serve.child import RequestError
from fastgrad.deploy.serve.schema import Status, refusals
from fastgrad.deploy.serve.served import Model

with extra("serve"):
    from fastapi import FastAPI, Query
    from fastapi.responses import JSONResponse, Response

_log = logging.getLogger("uvicorn.error")


def add_status_routes(app: FastAPI, named: Callable[[str | None], Model]) -> None:
    """Add the routes; ``named`` returns the model of a name, or the first."""
    state, models, readers = app.state, app.state.models, app.state.readers

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/ready", summary="Whether to send requests here", responses={200: {"model": Status}, 503: {"model": Status}}
    )
    async def ready() -> JSONResponse:
        loaded = all(model.served.pool.ready for model in models.values())
        fine = state.ready and not state.draining and loaded and readers.active < readers.limits.queue
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    prometheus: dict[str, Any] = {
        "response_class": Response, "responses": {200: {"content": {"text/plain": {}}}, **refusals(404)},
    }  # fmt: skip

    @app.get("/metrics", summary="For Prometheus", **prometheus)
    @app.get("/metrics/{name}", summary="For Prometheus, of one of several models", **prometheus)
    async def metrics_route(name: str | None = None) -> Response:
        text = named(name).served.metrics.render()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    told: dict[str, Any] = {"responses": refusals(404)}

    @app.get("/model", summary="What travels with the model: shape, labels, threshold, scores", **told)
    @app.get("/model/{name}", summary="The same of one of several models", **told)
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
            "risk": served.description.risk,
        }

    def monitor_of(name: str | None) -> DriftMonitor:
        monitor = named(name).served.metrics.monitor
        if monitor is None:
            raise RequestError(404, "the model's file has no scores to compare with")
        return monitor

    @app.get("/drift", summary="Whether inputs have drifted, on how many, with which error rate", **told)
    @app.get("/drift/{name}", summary="The same of one of several models", **told)
    async def drift_route(name: str | None = None) -> dict[str, Any]:
        return monitor_of(name).state()

    noted: dict[str, Any] = {"responses": refusals(404, 422)}

    @app.post("/drift", summary="Forget all inputs so far and the alarm; the log keeps the reason", **noted)
    @app.post("/drift/{name}", summary="The same of one of several models", **noted)
    async def drift_reset_route(
        action: Literal["reset"],
        reason: Annotated[str, Query(min_length=1, max_length=500, pattern=r"\S")],
        name: str | None = None,
    ) -> dict[str, Any]:
        monitor = monitor_of(name)
        monitor.reset()
        _log.warning("drift: %s, because %r", action, reason)
        return monitor.state()
