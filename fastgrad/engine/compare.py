"""Compare what samples give alone with what the batch gives: a difference is refused, and decides nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.engine.outputs import output_name
from fastgrad.engine.turns import reading
from fastgrad.evaluation import agree
from fastgrad.layers.call import NotPerSampleError


def differing(found: Iterable[tuple[str, Any]], batch: Mapping[str, Any], precision: float = 0.0) -> list[str]:
    """Return the names of tensors that are not the batch's own, to half the digits of their dtype.

    ``precision`` replaces the rounding error of the dtype if it is larger. Tensors of another shape than in the batch
    are rows of what the batch reduces, and have nothing to agree with.
    """
    return [
        name
        for name, t in found
        if isinstance(t, Tensor) and isinstance(other := batch.get(name), Tensor) and t.shape == other.shape
        and not agree(t.to(other.dtype), other, precision)
    ]  # fmt: skip


def drawn() -> tuple[Any, ...]:
    """Return the places of the generators of Python and NumPy, to see whether one was drawn from."""
    place: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), place[2]


def interact(name: str) -> NotPerSampleError:
    """Return the error for a model of which an output differs."""
    return NotPerSampleError(
        "model must treat the samples of a batch independently, or there is no gradient per sample; for one sample "
        f"alone, {output_name(name)} differs from that in the batch"
    )


def twin(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model in float64; None if it cannot be copied."""
    try:
        with reading():
            return copy.deepcopy(model).double()
    except Exception:  # whatever the user's own modules raise
        return None


def widened(tree: Any) -> Any:
    """Return copies of inputs in float64."""

    def wide(t: Tensor) -> Tensor:
        own = t.detach()
        own = own.double() if t.is_floating_point() else own.to(torch.complex128) if t.is_complex() else own.clone()
        return own.requires_grad_(t.requires_grad)

    return pytree.tree_map_only(Tensor, wide, tree)
