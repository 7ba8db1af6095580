"""An exported model on a Ray cluster: rows for data sets of Ray Data, and a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.checks import at_least, extra
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.file.package import read_description

if TYPE_CHECKING:
    import numpy as np


class ScoreImages:
    """Loads a model; called with a batch of images, as Ray Data does, it returns their rows as `score` writes them.

    For ``ray.data.read_binary_files(folder, include_paths=True).map_batches(ScoreImages, ...)``, with the arguments in
    ``fn_constructor_args`` and ``fn_constructor_kwargs``. Ray runs batches again whose process died.

    Args:
        model: File written by `fastgrad.export`, readable on every node.
        image_column: Column with the bytes of the images.
        name_column: Column with the names of the rows.
        false_alarm_rate: Share of in-distribution images to call unreliable; None for the model file's own.
        max_pixels: Larger images are not decoded.

    Raises:
        PackageError, ValueError: The file is not an exported model, takes no images or has no threshold for the rate.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        image_column: str = "bytes",
        name_column: str = "path",
        false_alarm_rate: float | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        from fastgrad.deploy.score import Scorer

        self._columns = name_column, image_column
        self._scorer = Scorer(model, false_alarm_rate=false_alarm_rate)
        self._max_pixels = max_pixels

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> Any:
        """Return a `pyarrow.Table` with a row for each image; that of an unreadable one has an ``error``."""
        import pyarrow as pa

        from fastgrad.deploy.dataset import decode

        names, contents = (batch[column] for column in self._columns)
        known, rows = self._scorer.description, []
        for start in range(0, len(names), known.max_batch):
            pairs = zip(names[start : start + known.max_batch], contents[start : start + known.max_batch], strict=True)
            rows += self._scorer([(str(name), decode(bytes(one), known, self._max_pixels)) for name, one in pairs])
        return pa.Table.from_pylist(rows, schema=self._scorer.schema)


def deployment(
    model: str | os.PathLike[str],
    *,
    replicas: int = 1,
    max_batch: int = 32,
    batch_wait: float = 0.005,
    max_queue: int = 256,
    max_body: int = 16 * 2**20,
    max_pixels: int = MAX_PIXELS,
    api_key: str | None = None,
    false_alarm_rate: float | None = None,
    gpus_per_replica: float = 0,
) -> Any:
    """Return a Ray Serve application that answers ``POST`` as the server's ``/predict`` does.

    Ray brings batching, replicas, draining and back-pressure (503). Its proxy reads a body before the deployment can
    refuse it, and a body that takes long is not stopped. There is no page, and there are no metrics and no drift
    monitor.

    Args:
        model: File written by `fastgrad.export`, readable on every node.
        replicas: Processes that hold the model.
        max_batch: Largest batch.
        batch_wait: Seconds in which a batch may fill.
        max_queue: Requests that may wait.
        max_body: Bytes of a request body; a larger one is answered 413.
        max_pixels: Pixels of an image; more are answered 413.
        api_key: Key that requests must carry, if given.
        false_alarm_rate: Share of in-distribution inputs to flag.
        gpus_per_replica: GPUs that each replica claims.

    Raises:
        PackageError, ValueError: The file is not an exported model, or has no threshold for the rate.
    """
    with extra("cluster"):
        from ray import serve
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import JSONResponse

    from fastgrad.deploy.serve.bodies import Bodies
    from fastgrad.deploy.serve.guard import Guard
    from fastgrad.deploy.serve.process import Answerer, Body, Refusal

    at_least(1, replicas=replicas, max_batch=max_batch, max_queue=max_queue, max_body=max_body, max_pixels=max_pixels)
    path, guard = str(Path(model).resolve()), Guard(api_key)
    description = read_description(path)
    description.threshold_at(false_alarm_rate)

    @serve.deployment(
        num_replicas=replicas, max_ongoing_requests=2 * max_batch, max_queued_requests=max_queue,
        ray_actor_options={"num_gpus": gpus_per_replica} if gpus_per_replica else {},
    )  # fmt: skip
    class Model:
        def __init__(self) -> None:
            self.answers = Answerer(path, false_alarm_rate=false_alarm_rate, max_pixels=max_pixels)
            self.bodies = Bodies(2 * max_batch, max_body, 2 * max_batch * max_body)

        @serve.batch(max_batch_size=min(max_batch, description.max_batch), batch_wait_timeout_s=batch_wait)
        async def run(self, bodies: list[Body]) -> list[Any]:
            return await asyncio.to_thread(self.answers, bodies)

        async def __call__(self, request: Request) -> JSONResponse:
            try:
                guard.check(request.scope)
                async with self.bodies.read(request) as body:
                    found = await self.run(Body(request.headers.get("content-type", ""), body))
            except HTTPException as error:
                return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            if isinstance(found, Refusal):
                return JSONResponse({"detail": found.reason}, found.status)
            return JSONResponse(found)

    return Model.bind()  # type: ignore[attr-defined]
