"""Handle batches of inputs in any structure that a model takes, and find the logits in its output."""

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
#: Values in a piece of a batch on a CPU: six images at 224 x 224 pixels, which fit its caches. Of a batch of 50, each
#: takes two or three times as long.
_NUMBERS = 1 << 20


def input_tensors(*trees: Any) -> list[Tensor]:
    """Return all tensors among the inputs."""
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def batch_size(*trees: Any) -> int:
    """Return the size of dimension 0 of the first tensor that has one; ValueError if none has, or it is not dense."""
    for tensor in input_tensors(*trees):
        if tensor.dim():
            holds_values("inputs with a row for each sample", tensor)
            return tensor.shape[0]
    held = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(trees) if not isinstance(leaf, Tensor)})
    raise ValueError(f"inputs must hold a tensor with the batch in dimension 0; they held {', '.join(held) or 'none'}")


def take(tree: Tree, index: Tensor | slice, samples: int, carriers: Sequence[bool] | None = None) -> Tree:
    """Return ``tree`` with the rows ``index`` of every tensor that carries the batch of ``samples``; all else as it is.

    ``carriers`` says which leaves carry the batch; by default, tensors with ``samples`` rows.
    """
    leaves, spec = pytree.tree_flatten(tree)
    carriers = carrying(leaves, samples) if carriers is None else carriers
    for leaf in itertools.compress(leaves, carriers):
        holds_values("inputs with a row for each sample", leaf)
    # A tensor that is given twice stays one object: attention checks whether query and key are identical.
    cut: dict[int, Any] = {}
    for leaf in itertools.compress(leaves, carriers):
        if id(leaf) not in cut:
            cut[id(leaf)] = same_class(leaf[index.to(leaf.device) if isinstance(index, Tensor) else index], leaf)
    rows = [cut[id(leaf)] if carries else leaf for leaf, carries in zip(leaves, carriers, strict=True)]
    taken: Tree = pytree.tree_unflatten(rows, spec)
    return taken


def pieces(tree: Tree, device: torch.device) -> Iterator[Tree]:
    """Yield a batch in pieces that a network on ``device`` is fast on."""
    samples, numbers = batch_size(tree), sum(tensor.numel() for tensor in input_tensors(tree))
    size = max(1, _NUMBERS * samples // max(1, numbers)) if device.type == "cpu" else samples
    for start in range(0, samples, size):
        yield take(tree, slice(start, start + size), samples)


def same_class(made: Tensor, tensor: Tensor) -> Tensor:
    """Return ``made`` in the class of ``tensor``, which torchvision's images lose when they are indexed."""
    return made if type(made) is type(tensor) else made.as_subclass(type(tensor))


def carrying(leaves: Sequence[object], samples: int) -> tuple[bool, ...]:
    """Return whether each leaf of the inputs is a tensor with ``samples`` rows."""
    return tuple(isinstance(t, Tensor) and t.dim() > 0 and bool(t.shape[0] == samples) for t in leaves)


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def one_for_none(tree: Tree) -> Tree:
    """Return ``tree`` with one sample of zeros in each empty tensor, to learn the result shapes of an empty batch."""
    filled: Tree = pytree.tree_map_only(
        Tensor, lambda t: t.new_zeros((1, *t.shape[1:])) if t.dim() and not t.shape[0] else t, tree
    )
    return filled


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Return ``tree`` with every tensor on ``device``."""
    moved: Tree = pytree.tree_map_only(Tensor, lambda t: t.to(device), tree)
    return moved


def copied(tree: Tree) -> Tree:
    """Return ``tree`` with a copy of every tensor: a network may write to its inputs."""
    copy: Tree = pytree.tree_map_only(Tensor, Tensor.clone, tree)
    return copy


def split_batch(name: str, batch: Any) -> tuple[Tensor | dict[str, Any], Any]:
    """Split a loader's batch into its inputs, a tensor or a mapping, and the labels or other values beside them.

    Those are the second item of a tuple or list, or a mapping's entry "labels"; None if there is neither. TypeError for
    other inputs, ValueError for tensors that are not dense or hold no values.
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
    """Return a model's positional and keyword arguments, from a tensor or from a mapping of keyword arguments."""
    return ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, ``.logits``, ``["logits"]``, or a tuple's first item."""
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
    """Return the logits ``(B, N)`` in a classifier's output, B being ``samples`` if given; ValueError for others."""
    logits = logits_of(output)
    if logits.dim() != 2 or not logits.is_floating_point() or samples not in (None, logits.shape[0]):
        wanted = "(B, N)" if samples is None else f"(B, N) with B = {samples}"
        raise ValueError(
            f"model must return logits of shape {wanted}; it returned {tuple(logits.shape)}, {logits.dtype}"
        )
    return logits


def refuse_probabilities(logits: Tensor) -> None:
    """Raise ValueError if every row of ``logits`` is a distribution already: a softmax would change it."""
    tolerance = min(1e-3, 32 * torch.finfo(logits.dtype).eps)
    sums = logits.double().sum(1)
    if len(logits) and logits.shape[1] > 1 and bool(((sums - 1).abs() <= tolerance).all() and (logits >= 0).all()):
        raise ValueError(
            "model must return logits; it returned probabilities, whose rows sum to 1. Leave out its last softmax, or "
            "return their logarithms"
        )


def bar(items: Iterable[Any], name: str, verbose: bool | None, *, unit: str = "batch") -> Iterable[Any]:
    """Return ``items``, with a progress bar if ``verbose``.

    None shows one in a terminal, or prints one line there if tqdm is not installed.
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
