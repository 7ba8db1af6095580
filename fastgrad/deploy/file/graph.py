"""A module's computation as one flat graph for any batch size."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import flat_graph
from fastgrad.checks import without_warnings


def trace(function: Callable[[Tensor], Any], example_input: Tensor, *, max_batch: int = 1024) -> Any:
    """Record ``function``; return a `torch.export.ExportedProgram` with a dynamic batch size.

    It maps a tensor ``(B, ...)`` like ``example_input`` to a tuple of tensors with B rows.

    RuntimeError if the graph depends on the batch size.
    """
    one = example_input.detach()[:1].contiguous()
    batch = one.expand(3, *one.shape[1:]).contiguous()
    # The batch that is recorded must have an allowed size.
    size = torch.export.Dim("batch", min=1, max=max(max_batch, len(batch)))
    with without_warnings():
        try:
            graph = flat_graph(function, batch)
            return torch.export.export(graph, (batch,), dynamic_shapes=({0: size},))
        except Exception as error:
            if re.search("constraint|speciali|concrete integer", str(error), re.IGNORECASE):
                raise RuntimeError(
                    "the model's computation depends on the batch size, or has an operation that PyTorch has for fixed "
                    "sizes alone, so it has no graph for every size. Take the size as x.shape[0], without int(), len() "
                    "or a loop over x"
                ) from error
            raise
