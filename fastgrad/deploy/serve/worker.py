"""The process that runs the model.

A request holds the inputs of one batch, each as `decoder` returns it. The reply is `ModelPackage.rows`, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastgrad.deploy.file.description import DTYPES, Description, normalize_pixels
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve.decoder import PIXELS


def start(path: str, threads: int | None) -> Callable[[bytearray], bytes]:
    """Load the model and return the function that answers requests with it."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = ModelPackage(path)
    description = model.description
    # The first run allocates memory and starts threads; no request should wait for that.
    model.rows(torch.zeros(1, *description.input_shape, dtype=DTYPES[description.input_dtype], device="cpu"))
    return lambda request: model.rows(batch_of(request, description)).astype("<f8").tobytes()


def batch_of(content: bytearray, description: Description) -> Tensor:
    """Return the inputs ``(B, *input_shape)``, normalized."""
    shape, dtype = description.input_shape, DTYPES[description.input_dtype]
    wide = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    inputs: list[Tensor] = []
    place = 0
    while place < len(content):
        pixels = content[place : place + 1] == PIXELS
        values = np.frombuffer(content, np.uint8 if pixels else wide, math.prod(shape), place + 1)
        # PyTorch requires aligned numbers; others are copied.
        x = torch.from_numpy(np.require(values, requirements="A").reshape(shape))
        inputs.append(normalize_pixels(description, x) if pixels else x.to(dtype))
        place += 1 + values.nbytes
    return torch.stack(inputs)
