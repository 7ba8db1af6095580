"""The exported model behind Ray Serve: replicas, batching and back-pressure are Ray's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.file.package import ModelPackage, read_description


def deployment(
    model: str | os.PathLike[str],
    *,
    replicas: int = 1,
    max_batch: int = 32,
    batch_wait: float = 0.005,
    max_queue: int = 256,
    max_body: int = 16 * 2**20,
    max_pixels: int = MAX_PIXELS,
    false_alarm_rate: float | None = None,
    gpus_per_replica: float = 0,
) -> Any:
    """A Ray Serve application that answers ``POST /`` as the server's ``/predict`` does.

    Ray brings batching, replicas, draining and back-pressure (503); what `fastgrad serve` has beyond that,
    page, metrics of uncertainty, drift and key, it leaves to the proxy in front.

    Args:
        model: file written by `fastgrad.export`, readable on every node.
        replicas: processes that hold the model.
        max_batch: largest batch.
        batch_wait: seconds to wait for a batch to fill.
        max_queue: waiting requests; more are answered 503.
        max_body: bytes of a body; more is answered 413.
        max_pixels: of an image; more is answered 413.
        false_alarm_rate: share of in-distribution inputs to flag; None: the model file's own.
        gpus_per_replica: GPUs that each replica claims.

    Returns:
        What `ray.serve.run` takes.

    Raises:
        PackageError: not an exported model.
        ValueError: the file has no threshold for that rate.
    """
    import numpy as np
    import torch

    with extra("cluster"):
        from ray import serve
        from starlette.requests import Request
        from starlette.responses import JSONResponse

    from fastgrad.deploy.file.answer import ResultError, answer, results
    from fastgrad.deploy.serve.requests import RequestError, read_input

    path = str(Path(model).resolve())
    description = read_description(path)
    threshold = description.threshold_at(false_alarm_rate)

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=2 * max_batch,
        max_queued_requests=max_queue,
        ray_actor_options={"num_gpus": gpus_per_replica} if gpus_per_replica else {},
    )
    class Model:
        def __init__(self) -> None:
            self.model = ModelPackage(path)

        @serve.batch(max_batch_size=min(max_batch, description.max_batch), batch_wait_timeout_s=batch_wait)
        async def run(self, inputs: list[Any]) -> list[tuple[Any, ...]]:
            return list(zip(*results(self.model, torch.from_numpy(np.stack(inputs))), strict=True))

        async def __call__(self, request: Request) -> JSONResponse:
            try:
                body = await request.body()
                if len(body) > max_body:
                    raise RequestError(413, f"the body is too large; at most {max_body} bytes are allowed")
                if not body:
                    raise RequestError(400, "the body is empty")
                kind = request.headers.get("content-type", "")
                x = await read_input(kind, body, description, max_pixels=max_pixels)
                return JSONResponse(answer(description, threshold, *await self.run(x.numpy())))
            except RequestError as error:
                return JSONResponse({"detail": error.message}, error.status)
            except ResultError as error:
                return JSONResponse({"detail": str(error)}, 422)

    application: Any = Model
    return application.bind()


def serve_model(
    model: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> Any:
    """Start Ray Serve with `deployment` at ``/predict``; return its handle.

    Args:
        model: file written by `fastgrad.export`.
        host: address each node's proxy listens on; loopback unless told otherwise.
        port: its port.
        **options: of `deployment`.
    """
    with extra("cluster"):
        from ray import serve

    serve.start(http_options={"host": host, "port": port})
    return serve.run(deployment(model, **options), name="fastgrad", route_prefix="/predict")
