"""The exported model behind Ray Serve, which brings replicas, batching and back-pressure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.file.package import ModelPackage, read_description
from fastgrad.deploy.serve.bodies import Limits, Readers
from fastgrad.deploy.serve.child import RequestError
from fastgrad.deploy.serve.guard import Guard, refusal
from fastgrad.deploy.serve.worker import batch_of


def deployment(
    model: str | os.PathLike[str], *, replicas: int = 1, max_batch: int = 32, batch_wait: float = 0.005,
    limits: Limits = Limits(), api_key: str | None = None, allowed_hosts: Collection[str] = (),  # noqa: B008 - frozen
    false_alarm_rate: float | None = None, gpus_per_replica: float = 0,
) -> Any:  # fmt: skip
    """Return a Ray Serve application that answers ``POST /`` as the server's ``/predict`` does.

    Ray brings batching, replicas, draining and back-pressure (503). Requests are checked and bodies are read as by the
    server, but Ray's proxy reads a body before that. There is no page, and there are no metrics and no drift monitor.

    Args:
        model: File written by `fastgrad.export`, readable on every node.
        replicas: Processes that hold the model.
        max_batch: Largest batch.
        batch_wait: As for `create_app`, and so are the next four.
        limits: See `Limits`.
        api_key: Key that requests must carry, if given.
        allowed_hosts: Names allowed in ``Host``.
        false_alarm_rate: Share of in-distribution inputs to flag.
        gpus_per_replica: GPUs that each replica claims.

    Raises:
        PackageError, ValueError: The file is not an exported model, or has no threshold for the rate.
    """
    with extra("cluster"):
        from ray import serve
        from starlette.requests import Request
        from starlette.responses import JSONResponse

    path, guard = str(Path(model).resolve()), Guard(api_key, allowed_hosts)
    description = read_description(path)
    threshold = description.threshold_at(false_alarm_rate)

    @serve.deployment(
        num_replicas=replicas, max_ongoing_requests=2 * max_batch, max_queued_requests=limits.queue,
        ray_actor_options={"num_gpus": gpus_per_replica} if gpus_per_replica else {},
    )  # fmt: skip
    class Model:
        def __init__(self) -> None:
            self.model, self.readers = ModelPackage(path), Readers(2, limits)
            self.starting: asyncio.Task[None] | None = None

        @serve.batch(max_batch_size=min(max_batch, description.max_batch), batch_wait_timeout_s=batch_wait)
        async def run(self, inputs: list[bytes]) -> list[Any]:
            return list(await asyncio.to_thread(self.model.rows, batch_of(bytearray().join(inputs), description)))

        async def __call__(self, request: Request) -> JSONResponse:
            try:
                guard.check(request.scope)
                self.starting = self.starting or asyncio.ensure_future(self.readers.pool.start())
                await asyncio.shield(self.starting)
                return JSONResponse(await self.readers.answer(request, description, threshold, self.run))
            except RequestError as error:
                return refusal(error)

    return Model.bind()  # type: ignore[attr-defined]


def serve_model(model: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> Any:
    """Start Ray Serve with `deployment` at ``/predict``; return its handle.

    Args:
        model: File written by `fastgrad.export`.
        host: Address on which the proxy of each node listens.
        port: Its port.
        **options: Arguments of `deployment`.
    """
    with extra("cluster"):
        import ray
        from ray import serve

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    serve.start(http_options={"host": host, "port": port})
    return serve.run(deployment(model, **options), name="fastgrad", route_prefix="/predict")
