"""Choose where a network's channels are read: at normalisation layers, or at other layers if those say less.

A normalised channel has the same scale in every input of the training distribution, so its mean square over positions
says how unusual an input is. Layer norms give every position of every input the same scale, however unusual it is. So a
network with only layer norms, or none, is read at its convolutional, linear, recurrent and attention layers.

To cost little, some maps are read, on a coarse grid of positions: neighbouring layers say nearly the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import BatchNorm, ConvNd, InstanceNorm, is_traced

#: With fewer places of one kind than this, the next kind is read instead.
_LEAST = 2
#: Largest number of values read, as a share of the forward pass's operations: about a tenth of its time.
_READ = 1 / 600
#: Largest number of maps read, and longest axis of a map of which every position is read.
_SPREAD, _GRID = 12, 8
_CHANNELS_FIRST = (BatchNorm, InstanceNorm, nn.GroupNorm, nn.LocalResponseNorm, ConvNd)
#: Part of the class name of a normalisation layer. "Normalize" is excluded: it rescales pixels before the network.
_NORM = re.compile("Norm(?!s|alize)")
#: Layers that are read if a network does not normalise.
LAYERS = (ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Channels:
    """One place where channels are read."""

    path: str  # the module whose output is read; if it returns several tensors, the first
    dim: int  # dimension of the channels, 1 or -1; all dimensions but this and the batch are positions
    count: int  # number of channels
    grid: int = 0  # longer axes of a map are read at fewer positions than this; 0 reads all positions


def output_of(output: Any) -> Tensor | None:
    """Return the tensor to read from a module's output, the first if there are several."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def is_normalization(module: nn.Module) -> bool:
    """Whether a module normalises, by its class name: torch, timm and Hugging Face follow the same convention."""
    named = _NORM.search(type(module).__name__) or isinstance(module, (BatchNorm, nn.LayerNorm))
    # A container of a convolution and its normalisation is named after both.
    return bool(named) and not any(isinstance(part, LAYERS) or is_normalization(part) for part in module.children())


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module normalises each position by itself."""
    name = type(module).__name__
    return isinstance(module, nn.LayerNorm) or "LayerNorm" in name or "RMSNorm" in name


def channel_dim(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Return the dimension, 1 or -1, of the channels in an output of this ``shape``; None if it has none."""
    if len(shape) < 2:
        return None
    if len(shape) == 2 or isinstance(module, _CHANNELS_FIRST):
        return 1
    weight = getattr(module, "weight", None)
    count = len(weight) if isinstance(weight, Tensor) and weight.dim() == 1 else None
    # If both dimensions fit, the name tells a norm of maps (FrozenBatchNorm2d, LayerNorm2d).
    return 1 if shape[1] == count and (shape[-1] != count or "2d" in type(module).__name__) else -1


def choose(seen: Sequence[tuple[nn.Module, Channels, Tensor]], operations: float) -> tuple[Channels, ...]:
    """Return which places to read of those ``seen``, in order and with outputs, in a forward pass of one sample.

    For maps, these are a few places from the first to the last, on a grid. For tokens, whose first layers represent
    words, they are the last places: as many as the pass's ``operations`` allow, but at least two.
    """
    norms = [found for found in seen if is_normalization(found[0])]
    steady = [found for found in norms if not is_layer_norm(found[0])]
    layers = [found for found in seen if isinstance(found[0], LAYERS)]
    picked = next((places for places in (steady, layers) if len(places) >= _LEAST), layers or norms)
    if all(place.dim == 1 for _, place, _ in picked):
        step = -(-len(picked) // _SPREAD) or 1
        few = picked[(len(picked) - 1) % step :: step]
        return tuple(replace(place, grid=_GRID) for _, place, _ in few)
    found: list[Channels] = []
    numbers = 0
    for _, place, value in reversed(picked):
        numbers += value.numel()
        if numbers > _READ * operations and len(found) >= _LEAST:
            break
        found.append(place)
    return tuple(reversed(found))


def sampled(value: Tensor, grid: int) -> Tensor:
    """Copy a map ``(B, C, ...)`` at fewer than ``grid`` evenly spaced positions along each axis longer than ``grid``.

    The first position of such an axis is left out: it saw the padding. In a recorded graph, a pooling takes the
    positions, so that exported files keep the layout of their convolutions. Elsewhere a copy is several times as fast.
    """
    steps = tuple(-(-length // grid) for length in value.shape[2:])
    inside = (..., *(slice(None if step == 1 else step, None, step) for step in steps))
    if not is_traced() or all(step == 1 for step in steps) or len(steps) > 3:
        return value[inside].clone(memory_format=torch.contiguous_format)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(steps) - 1]
    inside = (..., *(slice(None if step == 1 else 1, None) for step in steps))
    result: Tensor = pool(value, 1, steps)[inside]
    return result
