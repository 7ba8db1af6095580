"""Batches: tensors, or mappings of a model's keyword arguments, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.engine.network import batch_size, take
from fastgrad.features import logits_of

Inputs = Tensor | Mapping[str, Any]


def first_input(name: str, batch: Any) -> Inputs:
    """The inputs of a loader's batch: a tensor, a mapping, or the first of a tuple.

    Raises:
        TypeError: It is something else; ``name`` is the loader's.
    """
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, (Tensor, Mapping)):
        raise TypeError(
            f"{name} must give tensors, mappings or tuples that begin with one; it gave {type(x).__name__}"
        )
    return x


def length(x: Inputs) -> int:
    """B."""
    return len(x) if isinstance(x, Tensor) else len(next(v for v in x.values() if isinstance(v, Tensor)))


def take_rows(x: Inputs, rows: slice) -> Inputs:
    """Some samples."""
    if isinstance(x, Tensor):
        return x[rows]
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in x.items()}


def to_device(x: Inputs, device: torch.device) -> Inputs:
    """The batch on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in x.items()}


__all__ = ["Inputs", "batch_size", "first_input", "length", "logits_of", "take", "take_rows", "to_device"]
