"""Batches of inputs in whatever structure a model takes them, and the logits in whatever it returns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.checks import extra, holds_values

Tree = TypeVar("Tree")
#: Inputs in doubt up to which every choice is tried.
_DOUBTS = 4


def input_tensors(*trees: Any) -> list[Tensor]:
    """All tensors among the inputs."""
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def batch_size(*trees: Any) -> int:
    """Dimension 0 of the first tensor among the inputs that has one; ValueError if there is none, or it is nested."""
    for tensor in input_tensors(*trees):
        if tensor.dim():
            holds_values("inputs with a row for each sample", tensor)
            return tensor.shape[0]
    held = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(trees) if not isinstance(leaf, Tensor)})
    raise ValueError(f"inputs must hold a tensor with the batch in dimension 0; they held {', '.join(held) or 'none'}")


def take(tree: Tree, index: Tensor | slice, samples: int, carriers: Sequence[bool] | None = None) -> Tree:
    """Some rows of every tensor that carries the batch of ``samples``; all else as it is.

    ``carriers`` says for each leaf whether it does; by default what has as many rows does.
    """
    leaves, spec = pytree.tree_flatten(tree)
    carriers = carrying(leaves, samples) if carriers is None else carriers
    for leaf in itertools.compress(leaves, carriers):
        holds_values("inputs with a row for each sample", leaf)
    rows = [
        same_class(leaf[index.to(leaf.device) if isinstance(index, Tensor) else index], leaf) if carries else leaf
        for leaf, carries in zip(leaves, carriers, strict=True)
    ]
    taken: Tree = pytree.tree_unflatten(rows, spec)
    return taken


def same_class(made: Tensor, tensor: Tensor) -> Tensor:
    """What was made of ``tensor``, in its class, which torchvision's images leave when they are indexed."""
    return made if type(made) is type(tensor) else made.as_subclass(type(tensor))


def carrying(leaves: Sequence[object], samples: int) -> tuple[bool, ...]:
    """For each leaf of inputs, whether it has ``samples`` rows."""
    return tuple(isinstance(t, Tensor) and t.dim() > 0 and bool(t.shape[0] == samples) for t in leaves)


def choices(leaves: Sequence[object], samples: int) -> Iterator[tuple[bool, ...]]:
    """Which leaves of inputs may carry the batch, where the number of rows does not tell: a mask of B by B positions.

    The first tensor with B rows does. Others may not, where B is also another size; of many all do.
    """
    every = carrying(leaves, samples)
    _, *doubts = itertools.compress(range(len(leaves)), every)
    sizes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape[1:]]
    for count in range(len(doubts) + 1 if len(doubts) <= _DOUBTS and samples in sizes else 1):
        for left_out in itertools.combinations(doubts, count):
            yield tuple(carries and i not in left_out for i, carries in enumerate(every))


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def one_for_none(tree: Tree) -> Tree:
    """The same with one sample of zeros in place of none, whose results have the shapes of those of none."""
    filled: Tree = pytree.tree_map_only(
        Tensor, lambda t: t.new_zeros((1, *t.shape[1:])) if t.dim() and not t.shape[0] else t, tree
    )
    return filled


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The same with every tensor on ``device``."""
    moved: Tree = pytree.tree_map_only(Tensor, lambda t: t.to(device), tree)
    return moved


def copied(tree: Tree) -> Tree:
    """A copy of every tensor: a network may write to its inputs."""
    copy: Tree = pytree.tree_map_only(Tensor, Tensor.clone, tree)
    return copy


def split_batch(name: str, batch: Any) -> tuple[Tensor | dict[str, Any], Any]:
    """The inputs in the batch of a loader, a tensor or a mapping, and what stands beside them.

    That is the second of a tuple, or what a mapping has under "labels"; None if there is neither. TypeError for other
    inputs, ValueError for tensors that are sparse or hold no values.
    """
    for tensor in input_tensors(batch):
        holds_values(f"tensors of {name}", tensor)
    pair = isinstance(batch, (tuple, list)) and len(batch) > 0
    x = batch[0] if pair else batch
    beside = batch[1] if pair and len(batch) > 1 else None
    if isinstance(x, Tensor):
        return x, beside
    if not isinstance(x, Mapping):
        raise TypeError(f"{name} must give tensors, mappings or tuples that begin with one; it gave {type(x).__name__}")
    inputs = dict(x)
    labels = inputs.pop("labels", None)
    return inputs, labels if beside is None else beside


def as_call(x: Tensor | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's positional inputs and those by keyword, from a tensor or a mapping of the latter."""
    return ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model must return logits as a tensor, as .logits, under 'logits' or first in a tuple; "
            f"it returned {type(output).__name__}"
        )
    return logits


def class_logits(output: Any, samples: int | None = None) -> Tensor:
    """The logits ``(B, N)`` in a classifier's output, with B ``samples`` if given; ValueError for other tensors."""
    logits = logits_of(output)
    if logits.dim() != 2 or not logits.is_floating_point() or samples not in (None, logits.shape[0]):
        wanted = "(B, N)" if samples is None else f"(B, N) with B = {samples}"
        raise ValueError(
            f"model must return logits of shape {wanted}; it returned {tuple(logits.shape)}, {logits.dtype}"
        )
    return logits


def refuse_probabilities(logits: Tensor) -> None:
    """Raise ValueError where all rows of ``logits`` are distributions, of which a softmax would be another."""
    tolerance = min(1e-3, 32 * torch.finfo(logits.dtype).eps)
    sums = logits.double().sum(1)
    if len(logits) and logits.shape[1] > 1 and bool(((sums - 1).abs() <= tolerance).all() and (logits >= 0).all()):
        raise ValueError(
            "model must return logits; it returned probabilities, whose rows sum to 1. Leave out its last softmax, or "
            "return their logarithms"
        )


def bar(items: Iterable[Any], name: str, verbose: bool | None, *, unit: str = "batch") -> Iterable[Any]:
    """``items``, with a progress bar if ``verbose``.

    None shows one where a terminal is attached, or a line where tqdm is not installed.
    """
    if verbose is None and sys.stderr and sys.stderr.isatty():
        verbose = find_spec("tqdm") is not None
        if not verbose:
            print(f"fastgrad: {name} ...", file=sys.stderr)
    if not verbose:
        return items
    with extra("demo"):
        from tqdm.auto import tqdm

    shown: Iterable[Any] = tqdm(items, desc=name, unit=unit)
    return shown
