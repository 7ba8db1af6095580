"""Where the batch is in what a model returns, told by shapes: that of one sample beside that of an ordinary call.

A dimension that is 1 for the sample and B for the batch is the batch. A tensor of a sample without such a dimension,
such as a loss, becomes a row of ``(B, *shape)``. Nothing is told from values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.layers.call import NotPerSampleError

#: Leaves, a function that rebuilds the tree from other leaves, and the leaves' names.
Tree = tuple[list[Any], Callable[[Sequence[Any]], Any], list[str]]
#: The dimension of a sample's tensor that is the batch; None if the samples are stacked in a new dimension 0.
Place = int | None


@dataclass(frozen=True)
class Stacked:
    """The tensors of some samples, ``(b, *shape)``, where ``shape`` is the one that the model saw."""

    values: Tensor


def join(rows: Tensor, place: Place) -> Tensor:
    """Return the batch's tensor from ``(B, *shape)``."""
    return rows if place is None else rows.movedim(0, place).flatten(place, place + 1)


def split(batch: Tensor, place: Place, samples: int) -> Tensor:
    """Return ``(B, *shape)`` from the batch's tensor."""
    if place is None:
        return batch
    rows: Tensor = batch.unflatten(place, (samples, batch.shape[place] // max(1, samples))).movedim(place, 0)
    return rows


def find_place(shape: Sequence[int], batch: Sequence[int], samples: int, name: str) -> Place:
    """Return where the batch is in a tensor that has ``shape`` for a sample and ``batch`` in an ordinary call.

    Several may serve where a size is 0; the first is taken. NotPerSampleError names a tensor that joins samples.
    """
    shape, batch = tuple(shape), tuple(batch)
    for at, size in enumerate(shape):
        if batch == (*shape[:at], samples * size, *shape[at + 1 :]) and samples > 1:
            return at
    if batch in (shape, (samples, *shape)):  # a reduction over the samples, or already a row for each
        return None
    raise NotPerSampleError(
        f"model must not join the samples of a batch; {name} has shape {shape} for one sample and {batch} for "
        f"{samples}, so that none of its dimensions is the batch"
    )


def likely_place(shape: Sequence[int]) -> Place:
    """Return the place of the batch in a tensor of which no ordinary call tells it: the first dimension of one."""
    return next((at for at, size in enumerate(shape) if size == 1), None)


def likely_join(rows: Tensor) -> Tensor:
    """Return the batch's tensor from ``(B, *shape)`` where no ordinary call tells the place."""
    return join(rows, likely_place(rows.shape[1:]))


def is_object(value: object) -> bool:
    """Whether a value has attributes that may hold tensors, such as a cache or the output of a library's model."""
    plain = isinstance(value, (Tensor, torch.nn.Module, type)) or callable(value)
    return hasattr(value, "__dict__") and not plain


def flatten(tree: Any, above: tuple[int, ...] = ()) -> Tree:
    """Return the leaves of a tree, a function that rebuilds it from other leaves, and the leaves' names.

    Objects with tensors in attributes are trees as well; ``above`` are the ids of the objects around this one.
    """
    if isinstance(tree, Tensor):
        return [tree], lambda values: values[0], [""]
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


def output_name(name: str) -> str:
    """Return how messages call an output."""
    return f"its output {name}".rstrip()


def require_rows(tree: Tree) -> Tree:
    """Return the tree; NotPerSampleError names a leaf that yields values when it is asked, and so cannot be rows."""
    for leaf, name in zip(tree[0], tree[2], strict=True):
        if isinstance(leaf, Iterator):
            raise NotPerSampleError(
                f"model must return tensors, not an iterator over them; {output_name(name)} was a "
                f"{type(leaf).__name__}. Return a list"
            )
    return tree


def joined(each: Sequence[Any], places: Sequence[Tensor | None], name: str) -> Stacked | Any:
    """Put one leaf of all parts of a batch together; ``places`` are the samples of each part, None for all.

    Tensors of samples become one `Stacked` in the order of the batch; anything else must be the same in all parts.
    """
    first = each[0]
    if len(each) == 1:
        return first
    if not all(isinstance(x, Stacked) for x in each):
        if any(isinstance(x, Stacked) for x in each) or not all(_same(first, x) for x in each[1:]):
            raise NotPerSampleError(
                f"model must give all samples the same {name.removeprefix('its ')}, or a tensor; it differs between "
                "samples that take different paths"
            )
        return first
    shapes = {(tuple(x.values.shape[1:]), x.values.dtype) for x in each}
    if len(shapes) > 1:
        found = " and ".join(sorted(f"{shape} of {dtype}" for shape, dtype in shapes))
        raise NotPerSampleError(f"model must return tensors of one shape for all samples; {name} was {found}")
    order = torch.cat([index for index in places if index is not None]).argsort()
    values = torch.cat([x.values for x in each])
    return Stacked(values.index_select(0, order.to(values.device)))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if is_object(a):
        return type(a) is type(b)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # comparisons of arrays, or of what the user compares in another way
        return False
