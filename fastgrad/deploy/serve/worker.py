"""The process that runs the model: inputs in, rows out, over its standard input and output.

A request is the inputs of one batch one after another, each as `decoder` gives it. The reply is the rows of
`ModelPackage.rows`, float64, or a status other than 0 and a reason.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastgrad.deploy.file.description import DTYPES, Description
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve.child import pipes, receive, reply
from fastgrad.deploy.serve.decoder import NUMBERS, PIXELS


def main(path: str, threads: int | None) -> None:
    """Load the model, say so or why not, then answer until the end of standard input."""
    requests, replies = pipes()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model = ModelPackage(path)
        # The first run allocates and starts threads; no request should wait for that.
        model.rows(
            torch.zeros(1, *model.description.input_shape, dtype=DTYPES[model.description.input_dtype])
        )
    except Exception as error:
        reply(replies, 500, str(error).encode("utf-8", "replace"))
        return
    reply(replies, 0, b"")
    while (request := receive(requests)) is not None:
        try:
            rows = model.rows(batch_of(request, model.description))
            reply(replies, 0, rows.astype("<f8").tobytes())
        except Exception as error:
            reply(replies, 500, str(error).encode("utf-8", "replace"))


def batch_of(content: bytearray, description: Description) -> Tensor:
    """The inputs ``(B, *input_shape)``, normalized."""
    shape, dtype = description.input_shape, DTYPES[description.input_dtype]
    wide = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    size = math.prod(shape)
    found: dict[bytes, list[np.ndarray]] = {PIXELS: [], NUMBERS: []}
    order: list[tuple[bytes, int]] = []
    place = 0
    while place < len(content):
        kind = bytes(content[place : place + 1])
        values = np.frombuffer(content, np.uint8 if kind == PIXELS else wide, size, place + 1)
        order.append((kind, len(found[kind])))
        found[kind].append(values.reshape(shape))
        place += 1 + values.nbytes
    parts = {kind: torch.from_numpy(np.stack(values)).to(dtype) for kind, values in found.items() if values}
    if PIXELS in parts:
        parts[PIXELS] = description.normalize(parts[PIXELS] / 255)
    if len(parts) == 1:
        return next(iter(parts.values()))
    return torch.stack([parts[kind][index] for kind, index in order])
