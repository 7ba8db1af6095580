"""The application of the server with a model that answers, waits or fails at will."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from fastgrad.deploy.serve.app import create_app

PNG = {"content-type": "image/png"}


def the_one(app: Any) -> Any:
    """What answers where no name is given."""
    return next(iter(app.state.models.values())).served


def make(package: Path, delay: float = 0.0, error: Exception | None = None, **options: Any) -> Any:
    app = create_app(str(package), **options)

    async def submit(value: np.ndarray, on_run: Any) -> tuple[np.ndarray, float]:
        await asyncio.sleep(delay)
        if error is not None:
            raise error
        return np.array([0.1, 0.2, 0.3, 0.4]), 1.0

    the_one(app).pool.submit = submit
    app.state.ready = True
    return app
