"""The application with processes that answer, wait or fail at will, in place of real ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_client import acall

from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.pool import ENDED
from fastgrad.deploy.serve.process import Body

PNG = {"content-type": "image/png"}
ANSWER = {
    "class": 0, "label": None, "probabilities": [1.0], "uncertainty": 1.0, "risk": None, "reliable": True,
    "accepted": None, "evidence": None, "alarm": None,
}  # fmt: skip


class FakeProcess:
    """Answers each body with ``ANSWER``, ``changes`` and the body as its label.

    A batch with a body of ``failing`` raises its error; one of those that the pool takes for its end ends the process.
    """

    def __init__(self, failing: dict[bytes, Exception] | None = None, delay: float = 0.0, **changes: Any) -> None:
        self.failing, self.delay, self.changes = failing or {}, delay, changes
        self.alive, self.starts = False, 0
        self.batches: list[list[bytes]] = []

    async def start(self) -> None:
        self.alive, self.starts = True, self.starts + 1

    async def ask(self, bodies: Sequence[Body], seconds: float) -> list[Any]:
        assert self.alive
        contents = [body.content for body in bodies]
        self.batches.append(contents)
        await asyncio.sleep(self.delay)
        for content in contents:
            if content in self.failing:
                self.alive = not isinstance(self.failing[content], ENDED)
                raise self.failing[content]
        return [{**ANSWER, "label": content.decode("latin-1"), **self.changes} for content in contents]

    async def stop(self) -> None:
        self.alive = False


def faked(path: Path, *processes: FakeProcess, **options: Any) -> Any:
    """The application of `create_app`, with these processes instead of its own."""
    app = create_app(path, workers=len(processes) or 1, **options)
    app.state.batcher.version.processes = list(processes) or [FakeProcess()]
    return app


def posts(app: Any, *requests: Any, pause: float = 0.0) -> list[tuple[int, dict[str, str], Any]]:
    """The answers to requests to /predict that come at once: bodies, or pairs of headers and chunks of a body."""

    async def run() -> list[Any]:
        await app.state.batcher.start()
        pairs = [(PNG, [one]) if isinstance(one, bytes) else one for one in requests]
        found = await asyncio.gather(
            *(acall(app, "POST", "/predict", {**PNG, **headers}, chunks, pause) for headers, chunks in pairs)
        )
        await app.state.batcher.stop()
        return found

    return [(status, sent, json.loads(body)) for status, sent, body in asyncio.run(run())]
