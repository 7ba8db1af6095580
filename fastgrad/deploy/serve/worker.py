"""The process that runs the model: batches in, results out, over one pipe."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection
from typing import Any


def main(pipe: Connection, path: str, threads: int | None) -> None:
    """Load the model, say ``("ready", None)`` or ``("failed", reason)``, then answer until the pipe closes.

    A batch is an array ``(B, *input_shape)``; its answer is ``("done", results)``, see `answer.results`, or
    ``("error", reason)``.
    """
    # Whoever stops the server may signal the whole process group; the server alone decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch

    from fastgrad.deploy.file.answer import results
    from fastgrad.deploy.file.package import ModelPackage

    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model = ModelPackage(path)
        # The first run allocates and starts threads; no request should wait for that.
        example = torch.zeros(1, *model.description.input_shape)
        model(example.to(getattr(torch, model.description.input_dtype)))
        pipe.send(("ready", None))
    except Exception as error:
        pipe.send(("failed", str(error)))
        return
    while True:
        try:
            batch: Any = pipe.recv()
        except EOFError:
            return
        if batch is None:
            return
        answer: tuple[str, Any]
        try:
            answer = ("done", results(model, torch.from_numpy(batch)))
        except Exception as error:
            answer = ("error", str(error))
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            return
