"""Which dimension of a model's outputs is the batch: from one result per sample to the result of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.evaluation import agree

#: Leaves, a function that rebuilds the tree from other leaves, and the leaves' names.
Tree = tuple[list[Any], Callable[[Sequence[Any]], Any], list[str]]


@dataclass(frozen=True)
class Stacked:
    """The tensors of all samples, ``(B, *shape)``, where ``shape`` is the one that the model saw."""

    values: Tensor


@dataclass(frozen=True)
class Layout:
    """How the tensors of the samples form that of the batch.

    ``kind`` is "rows" (side by side in dimension ``dim``), "stack" (the samples in a new dimension 0), "same" (one for
    all), "sum", "mean", or "mixed": computed from all samples in another way, which only an ordinary call gives.
    """

    kind: str
    dim: int = 0

    def join(self, rows: Tensor) -> Tensor:
        """Return the tensor of the batch from ``(B, *shape)``."""
        if len(rows) == 1:
            return rows[0]
        if self.kind == "rows":
            return rows.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        if self.kind == "stack":
            return rows
        return rows[0] if self.kind == "same" else rows.sum(0) if self.kind == "sum" else rows.mean(0)

    def split(self, batch: Tensor, samples: int) -> Tensor | None:
        """Return a tensor of the batch as ``(B, ...)``; None if it has no row for each sample."""
        if samples == 1:
            return batch.unsqueeze(0)
        if self.kind == "rows":
            rows: Tensor = batch.unflatten(self.dim, (samples, -1)).movedim(self.dim, 0)
            return rows
        return batch if self.kind == "stack" else None


SAME, MIXED = Layout("same"), Layout("mixed")


def default_layout(shape: Sequence[int]) -> Layout | None:
    """Return the likely layout of a tensor that has this shape for one sample, without a comparison."""
    return Layout("rows") if len(shape) and shape[0] == 1 else None


def find_layout(rows: Tensor, batch: Tensor, precision: float | None) -> Layout:
    """Return the layout in which ``(B, *shape)`` agrees with the ``batch``'s own result; `MIXED` if it agrees in none.

    ``precision`` is the relative rounding error of the coarsest numbers; None compares shapes alone.
    """
    shape = tuple(rows.shape[1:])
    found = [
        Layout("rows", d)
        for d, size in enumerate(shape)
        if tuple(batch.shape) == (*shape[:d], len(rows) * size, *shape[d + 1 :])
    ]
    if batch.shape == rows.shape:
        found.append(Layout("stack"))
    if tuple(batch.shape) == shape:
        alike = ((rows == rows[:1]) | (rows != rows)).all()
        found += [SAME] if alike else []
        found += [Layout("sum"), Layout("mean")] if rows.is_floating_point() else []
    fitting = (each for each in found if precision is None or agree(each.join(rows), batch, precision))
    return next(fitting, MIXED)


def is_object(value: object) -> bool:
    """Whether a value has attributes that may hold tensors, such as a cache or the output of a library's model."""
    plain = isinstance(value, (Tensor, torch.nn.Module, type)) or callable(value)
    return hasattr(value, "__dict__") and not plain


def flatten(tree: Any, above: tuple[int, ...] = ()) -> Tree:
    """Return the leaves of a tree, a function that rebuilds it from other leaves, and the leaves' names.

    Objects with tensors in attributes are trees as well; ``above`` are the ids of the objects around this one.
    """
    paths, spec = pytree.tree_flatten_with_path(tree)
    leaves: list[Any] = []
    names: list[str] = []
    parts: list[tuple[int, Any, Any]] = []
    for path, leaf in paths:
        name = pytree.keystr(path)
        if is_object(leaf) and id(leaf) not in above:
            own, rebuilt, inside = flatten(vars(leaf), (*above, id(leaf)))
            if any(isinstance(value, Tensor) for value in own):
                parts.append((len(own), leaf, rebuilt))
                leaves += own
                names += [name + one for one in inside]
                continue
        parts.append((1, None, None))
        leaves.append(leaf)
        names.append(name)

    def whole(values: Sequence[Any]) -> Any:
        at, own = 0, []
        for count, original, rebuilt in parts:
            some = list(values[at : at + count])
            at += count
            if rebuilt is not None:
                made = copy.copy(original)
                vars(made).update(rebuilt(some))
                some = [made]
            own += some
        return pytree.tree_unflatten(own, spec)

    return leaves, whole, names
