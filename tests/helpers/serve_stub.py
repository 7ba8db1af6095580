"""The application without its processes: bodies are read in this one, the model answers, waits or fails at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgrad.deploy.serve import decoder
from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.bodies import Limits
from fastgrad.deploy.serve.child import ChildDiedError

PNG = {"content-type": "image/png"}


def the_one(app: Any) -> Any:
    """What answers where no name is given."""
    return next(iter(app.state.models.values())).served


def stub(
    app: Any,
    rows: Mapping[Any, Sequence[float]],
    delay: float = 0.0,
    error: Exception | None = None,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
) -> Any:
    """Give each model a constant row instead of processes."""

    async def read(kind: str, body: bytes, description: Any) -> bytes:
        shape, dtype = description.input_shape, description.input_dtype
        return decoder.read_input(kind, bytes(body), shape, dtype, max_pixels=limits.pixels)

    app.state.readers.read = read
    for name, model in app.state.models.items():

        async def submit(*parts: bytes, name: str = name) -> bytes:
            await asyncio.sleep(delay)
            if error is not None:
                raise error
            return np.array(rows[name], float).tobytes()

        model.served.pool.submit = submit
    app.state.ready = True
    return app


def make(package: Path, delay: float = 0.0, error: Exception | None = None, **options: Any) -> Any:
    app = create_app(str(package), **options)
    # Probabilities, uncertainty and evidence.
    rows = dict.fromkeys(app.state.models, (0.1, 0.2, 0.3, 0.4, 1.0, 0.5, 0.5))
    return stub(app, rows, delay, error, options.get("limits", Limits()))


class FakeChild:
    """In place of a model's process: answers every input with 0.25 four times and its first byte, or dies as told."""

    def __init__(self, constant: float | None = None) -> None:
        self.batches: list[list[int]] = []
        self.poison: int | None = None
        self.die_on: set[int] = set()
        self.constant, self.alive = constant, False
        self.on_end: Callable[[], None] = lambda: None

    async def start(self, seconds: float) -> None:
        self.alive = True

    async def restart(self, seconds: float) -> None:
        await self.start(seconds)

    async def stop(self, patience: float = 0.0) -> None:
        self.alive = False

    def end(self) -> None:
        self.alive = False
        self.on_end()

    async def ask(self, parts: Sequence[bytes], seconds: float) -> bytes:
        await asyncio.sleep(0)
        if not self.alive:
            raise ChildDiedError("its process is not there")
        batch = [part[0] for part in parts]
        self.batches.append(batch)
        if self.poison in batch or len(self.batches) in self.die_on:
            self.end()
            raise ChildDiedError("killed")
        last = [value if self.constant is None else self.constant for value in batch]
        return np.array([[0.25] * 4 + [value] for value in last]).tobytes()
