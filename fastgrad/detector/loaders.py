"""What a user gives a fit: a loader, or all inputs at once; drawn uniformly, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import pytree
from fastgrad.batches import bar, batch_size, bytes_of, carrying, split_batch, take
from fastgrad.blocks.extraction import Inputs

#: Batches of a loader, or all inputs: a tensor, an array, or a mapping of tensors.
Given = Iterable[Any]
#: How many inputs are read together, however many the loader gives: a network rounds by the size of a batch, and what
#: 1e-7 becomes in a p-value's tail could decide an alarm.
TOGETHER = 64


class Drawn(NamedTuple):
    """Inputs drawn uniformly from a loader."""

    batches: list[Inputs]  # on the CPU; those of one batch have one shape
    tags: list[Any]  # what came with each input: a label, the kind of a challenge, or None
    hashes: list[int]  # a hash of each input; equal inputs have the same
    seen: int  # how many inputs the loader gave

    @property
    def images(self) -> list[Tensor]:
        """The batches if all are floating images ``(B, C, H, W)``, else none."""
        images = [x for x in self.batches if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()]
        return images if len(images) == len(self.batches) else []


def batches_of(name: str, data: Given, dtype: torch.dtype, y: Any = None) -> Given:
    """Return batches of inputs that were given all at once, with their labels ``y``, or the loader that was given.

    Floating arrays get the network's ``dtype``.
    """
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be an array of numbers; it was of {data.dtype}")
        data = torch.from_numpy(data)
        data = data.to(dtype) if data.is_floating_point() else data
    if not isinstance(data, (Tensor, Mapping)):
        if y is not None:
            raise TypeError(
                "y must be None beside a loader, whose batches are (x, labels), and challenges are named, "
                f"challenges=...; it was {type(y).__name__}"
            )
        checks.is_loader(name, data)
        return data
    count = batch_size(data)
    labels = None if y is None else np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if labels is not None and (labels.ndim == 0 or len(labels) != count):
        raise ValueError(f"y must have one label for each of {count} inputs; its shape was {labels.shape}")
    parts = [slice(start, start + TOGETHER) for start in range(0, count, TOGETHER)]
    return [(take(data, part, count), None if labels is None else labels[part]) for part in parts]


def draw(name: str, loader: Iterable[Any], limit: int, seed: int, *, verbose: bool | None = False) -> Drawn:
    """Draw at most ``limit`` inputs of a loader with equal probability, in one pass (reservoir sampling; Vitter, 1985).

    Its batches are ``x``, ``(x, something for each input)``, or mappings with labels among the inputs.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str, tuple[bool, ...], Inputs, Any]] = []
    seen = 0
    for batch in bar(loader, name, verbose):
        x, given = split_batch(name, batch)
        count = batch_size(x)
        tags, (leaves, structure) = _tags(name, given, count), pytree.tree_flatten(x)
        carriers = carrying(leaves, count)
        # Inputs of one kind can share a batch: keys have the same order, rows the same shape, and all else is equal.
        kind = str([structure, *map(_kind, leaves, carriers)])
        for i in range(count):
            place = seen if seen < limit else int(rng.integers(seen + 1))
            seen += 1
            if place < limit:
                row = take(x, slice(i, i + 1), count, carriers)
                row = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), row)
                kept[place : place + 1] = [(seen, kind, carriers, row, tags[i])]
    if not kept:
        raise ValueError(
            f"{name} must hold at least one batch; it was empty (an iterator can be read once: give a loader or list)"
        )
    kinds: dict[str, tuple[tuple[bool, ...], list[Inputs], list[tuple[Any, int]]]] = {}
    # In the loader's order.
    for _, kind, carriers, inputs, own in sorted(kept, key=lambda entry: entry[0]):
        _, rows, others = kinds.setdefault(kind, (carriers, [], []))
        rows.append(inputs)
        own_bytes = map(bytes_of, itertools.compress(pytree.tree_leaves(inputs), carriers))
        others.append((own, hash((kind, *own_bytes))))
    batches: list[Inputs] = []
    for carriers, rows, _ in kinds.values():
        for start in range(0, len(rows), TOGETHER):
            columns = zip(carriers, *map(pytree.tree_leaves, rows[start : start + TOGETHER]), strict=True)
            joined = [torch.cat(column) if carries else column[0] for carries, *column in columns]
            batches.append(pytree.tree_unflatten(joined, pytree.tree_structure(rows[0])))
    dimensions = sorted({x.dim() for x in batches if isinstance(x, Tensor)})
    # A network may add a dimension that some inputs lack, but inputs of one number each are labels.
    if len(dimensions) > 1 and dimensions[0] == 1:
        raise ValueError(
            f"{name} must give inputs of one number of dimensions; they had {dimensions}. Labels stand beside their "
            "inputs, in a loader or list of pairs: [(x, labels)]"
        )
    tags, hashes = map(list, zip(*(pair for _, _, others in kinds.values() for pair in others), strict=True))
    return Drawn(batches, tags, hashes, seen)


def _tags(name: str, value: Any, count: int) -> list[Any]:
    if value is None or isinstance(value, Mapping):
        return [None] * count
    given = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if len(listed) != count:
        raise ValueError(
            f"{name} must give one label per input, or inputs alone; a batch had {count} inputs and {len(listed)}. A "
            "batch of one input has a dimension of its own, x[None]"
        )
    return listed


def _kind(leaf: Any, carries: bool) -> Any:
    """Return what two inputs must have in common to share a batch."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.dtype, leaf.shape[1:] if carries else (leaf.shape, hash(bytes_of(leaf)))


def labels_of(name: str, drawn: Drawn, classes: int) -> Tensor:
    """Return checked class indices ``(n,)``; all -1 if the loader gave no labels."""
    given = [value for value in drawn.tags if value is not None]
    if not given:
        return torch.full((len(drawn.tags),), -1, dtype=torch.int64, device="cpu")
    wanted = f"{name} must give (x, labels), labels class indices from 0 to {classes - 1}, or inputs x alone"
    if len(given) < len(drawn.tags):
        raise ValueError(f"{wanted}; {len(drawn.tags) - len(given)} of {len(drawn.tags)} inputs had no label")
    if classes < 2:
        raise ValueError(
            f"{name} must give inputs x alone for a network with one output, which has no classes to confuse; "
            "for two classes return two, torch.cat([torch.zeros_like(z), z], 1)"
        )
    try:
        values = np.asarray(given)
    except ValueError:  # of several shapes
        values = np.asarray(given, object)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{wanted}; they were of shape {values.shape[1:]} each and {values.dtype}")
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(f"{wanted}; they went from {values.min()} to {values.max()}")
    if len(np.unique(values)) < 2:
        raise ValueError(f"{wanted}, of at least two classes; all {len(values)} were {values[0]}")
    return torch.from_numpy(values.astype(np.int64))
