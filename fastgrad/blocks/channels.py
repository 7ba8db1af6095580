"""Where a network's channels are read: the outputs of its normalisation layers, or of its layers where those say less.

A normalised channel has the same scale in every input of the training distribution, so its mean square over positions
says how unusual an input is. Layer norms give every position of every input the same scale, however unusual it is: a
network with these, or none, is read at its convolutional, linear, recurrent and attention layers.

Reading is to cost little: of a map a coarse grid of positions says enough, and neighbouring layers say nearly the same.
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

#: Fewer places of one kind than this say little, and the next kind is read instead.
_LEAST = 2
#: Of the forward pass's operations, the share of numbers that are read at most: a tenth of its time or so.
_READ = 1 / 600
#: Places that a forward pass reads at most, and positions along an axis of a map that are still read one by one.
_SPREAD, _GRID = 12, 8
_CHANNELS_FIRST = (BatchNorm, InstanceNorm, nn.GroupNorm, nn.LocalResponseNorm, ConvNd)
#: In a class's name; what brings pixels to another scale, "Normalize", is no layer of the network.
_NORM = re.compile("Norm(?!s|alize)")
#: Layers that are read where a network does not normalise.
LAYERS = (ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Channels:
    """One place where channels are read."""

    path: str  # the module whose output is read; of several tensors, the first
    dim: int  # where the channels lie, 1 or -1; all dimensions but this and the batch are positions
    count: int  # how many there are
    grid: int = 0  # of a map, each axis with more positions is read at fewer than so many; 0 for all


def output_of(output: Any) -> Tensor | None:
    """The tensor that is read of a module's output."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def is_normalization(module: nn.Module) -> bool:
    """Whether a module normalises, by its class's name, in which torch, timm and Hugging Face agree."""
    named = _NORM.search(type(module).__name__) or isinstance(module, (BatchNorm, nn.LayerNorm))
    # A container of a convolution and its normalisation is named after both.
    return bool(named) and not any(isinstance(part, LAYERS) or is_normalization(part) for part in module.children())


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module normalises each position by itself."""
    name = type(module).__name__
    return isinstance(module, nn.LayerNorm) or "LayerNorm" in name or "RMSNorm" in name


def channel_dim(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """1 or -1, the dimension of an output of this ``shape`` that holds the channels; None where it has none."""
    if len(shape) < 2:
        return None
    if len(shape) == 2 or isinstance(module, _CHANNELS_FIRST):
        return 1
    weight = getattr(module, "weight", None)
    count = len(weight) if isinstance(weight, Tensor) and weight.dim() == 1 else None
    # Where both may be, a norm of maps (FrozenBatchNorm2d, LayerNorm2d) says so in its name.
    return 1 if shape[1] == count and (shape[-1] != count or "2d" in type(module).__name__) else -1


def choose(seen: Sequence[tuple[nn.Module, Channels, Tensor]], operations: float) -> tuple[Channels, ...]:
    """Of all places seen in a forward pass of one sample, with their outputs and in order, those that are read.

    Of maps these are a few from the first to the last, on a grid. Of tokens, whose first layers are words, they are the
    last ones: as many as the pass's ``operations`` bear, and two in any case.
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
    """A copy of a map ``(B, C, ...)`` at less than ``grid`` positions along each longer axis, evenly spaced within it.

    The first of an axis is left out: it saw the padding. In a graph single positions are taken by a pooling, through
    which exported files keep to the layout of their convolutions; elsewhere a copy of them is several times as fast.
    """
    steps = tuple(-(-length // grid) for length in value.shape[2:])
    inside = (..., *(slice(None if step == 1 else step, None, step) for step in steps))
    if not is_traced() or all(step == 1 for step in steps) or len(steps) > 3:
        return value.detach()[inside].clone(memory_format=torch.contiguous_format)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(steps) - 1]
    inside = (..., *(slice(None if step == 1 else 1, None) for step in steps))
    result: Tensor = pool(value, 1, steps)[inside]
    return result
