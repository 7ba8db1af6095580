"""The data that a detector is fitted on: clean inputs drawn from a loader, challenges, and the blocks of both."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.batches import bar, batch_size, bytes_of, carrying, pieces, split_batch, take, to_device
from fastgrad.blocks.extraction import Extraction, Inputs
from fastgrad.challenges import CHALLENGES, PixelRange, iter_challenges
from fastgrad.challenges.attacks import gradients_reach
from fastgrad.challenges.tokens import iter_token_challenges
from fastgrad.detector.constants import CHALLENGED_TOGETHER
from fastgrad.detector.grey_levels import shifted


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Inputs drawn uniformly from a loader."""

    batches: list[Inputs]  # on the CPU; those of one batch have one shape
    tags: list[Any]  # what came with each input: a label, the kind of a challenge, or None
    keys: list[int]  # a hash of each input; equal inputs have the same
    seen: int  # how many inputs the loader gave

    def __len__(self) -> int:
        return len(self.tags)

    def images(self) -> list[Tensor]:
        """Return the batches if all are floating images ``(B, C, H, W)``, else none."""
        images = [x for x in self.batches if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()]
        return images if len(images) == len(self.batches) else []


def draw(name: str, loader: Iterable[Any], limit: int, seed: int, *, verbose: bool | None = False) -> Drawn:
    """Draw at most ``limit`` inputs of a loader with equal probability, in one pass (reservoir sampling; Vitter, 1985).

    Its batches are ``x``, ``(x, something for each input)``, or mappings with labels among the inputs.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str, tuple[bool, ...], Inputs, Any]] = []
    seen, size = 0, 1
    for batch in bar(loader, name, verbose):
        x, given = split_batch(name, batch)
        count = batch_size(x)
        size = max(size, count)
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
        for start in range(0, len(rows), size):
            columns = zip(carriers, *map(pytree.tree_leaves, rows[start : start + size]), strict=True)
            joined = [torch.cat(column) if carries else column[0] for carries, *column in columns]
            batches.append(pytree.tree_unflatten(joined, pytree.tree_structure(rows[0])))
    dimensions = sorted({x.dim() for x in batches if isinstance(x, Tensor)})
    # A network may add a dimension that some inputs lack, but inputs of one number each are labels.
    if len(dimensions) > 1 and dimensions[0] == 1:
        raise ValueError(
            f"{name} must give inputs of one number of dimensions; they had {dimensions}. Labels stand beside their "
            "inputs, in a loader or list of pairs: [(x, labels)]"
        )
    given, keys = map(list, zip(*(pair for _, _, others in kinds.values() for pair in others), strict=True))
    return Drawn(batches, given, keys, seen)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Clean inputs, n in all, and challenges."""

    clean: list[Drawn]  # from the loader of clean inputs, and from the calibration loader if there is one
    challenges: Drawn | None  # the user's
    labels: NDArray[np.int64]  # (n,), -1 for none
    sources: NDArray[np.intp]  # (n,): equal inputs have the same number, and stay on one side of each fit
    held_out: NDArray[np.bool_]  # (n,): those that only calibrate
    each: int  # challenges to generate from each input that is not held out; 0 for none
    pixels: PixelRange | None  # of images
    normalisation: list[list[float]] | None = None  # mean and standard deviation by channel, if the user gave them
    levels: Tensor | None = None  # (n,): by how many grey levels each image is shifted; None if inputs are not images


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


def labels_of(name: str, drawn: Drawn, classes: int) -> NDArray[np.int64]:
    """Return checked class indices ``(n,)``; all -1 if the loader gave no labels."""
    given = [value for value in drawn.tags if value is not None]
    if not given:
        return np.full(len(drawn), -1)
    wanted = f"{name} must give (x, labels), labels class indices from 0 to {classes - 1}, or inputs x alone"
    if len(given) < len(drawn):
        raise ValueError(f"{wanted}; {len(drawn) - len(given)} of {len(drawn)} inputs had no label")
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
    return values.astype(np.int64)


@dataclasses.dataclass
class FeatureTable:
    """What was read of clean inputs and challenges; rows of clean inputs come first, in their order."""

    blocks: dict[str, Tensor]  # (n, ...) by name
    logits: Tensor  # (n, N)
    kinds: NDArray[np.str_]  # of each; empty for clean inputs
    groups: NDArray[np.intp]  # the clean input that each is or was made from; -1 for the user's challenges


#: Inputs, the kind of each and the number of its source, both as `FeatureTable` has them.
Batch = tuple[Inputs, Sequence[str], Sequence[int]]


def drawn_batches(sample: Sample, verbose: bool | None) -> Iterator[Batch]:
    """Yield clean inputs, and the user's challenges, whose kinds are the values that came beside them."""
    first = 0
    for x in bar([x for drawn in sample.clean for x in drawn.batches], "clean inputs", verbose):
        count = batch_size(x)
        if sample.pixels is not None and sample.levels is not None:
            x = shifted(x, sample.levels[first : first + count].view(-1, 1, 1, 1), sample.pixels)
        yield x, [""] * count, range(first, first + count)
        first += count
    if sample.challenges is not None:
        tags = iter(sample.challenges.tags)
        for x in bar(sample.challenges.batches, "challenges", verbose):
            count = batch_size(x)
            kinds = ["challenge" if tag is None else f"kind {tag}" for tag in itertools.islice(tags, count)]
            yield x, kinds, [-1] * count


def generated_batches(
    sample: Sample, model: nn.Module, device: torch.device, seed: int, verbose: bool | None
) -> Iterable[Batch]:
    """Return challenges, if any, generated from inputs not held out; those of images are made when they are read."""
    if not sample.each:
        return ()
    clean, each, pixels = sample.clean[0], sample.each, sample.pixels
    fitting = np.flatnonzero(~sample.held_out[: len(clean)])
    if pixels is None:
        tokens = list(iter_token_challenges(clean.batches, fitting.tolist(), each=each, seed=seed))
        if not tokens:
            raise ValueError(
                "clean must give token ids that can be left out, moved or replaced, for challenges to be generated; "
                "all were padding, alone in their input, or held by every input. Give challenges=None, or a loader of "
                "challenges"
            )
        return bar(tokens, "challenges", verbose)

    def altered_images(pixels: PixelRange) -> Iterator[Batch]:
        """Yield them, with attacks only if gradients reach the images."""
        rows = [row for x in clean.images() for row in x.split(1)]
        attacked = gradients_reach(model, rows[0].to(device))
        names = [name for name, kind in CHALLENGES.items() if attacked or not kind.passes]
        parts: list[NDArray[np.intp]] = []
        for _, group in itertools.groupby(fitting, key=lambda number: rows[number].shape):
            alike = np.array(list(group))
            parts += np.split(alike, range(CHALLENGED_TOGETHER, len(alike), CHALLENGED_TOGETHER))
        first = 0
        for numbers in bar(parts, "challenges", verbose):
            inputs = torch.cat([rows[number] for number in numbers]).to(device)
            for made in iter_challenges(model, inputs, each=each, names=names, first=first, seed=seed, pixels=pixels):
                yield made.inputs, made.kinds, numbers[made.sources.cpu().numpy() - first].tolist()
            first += len(inputs)

    return altered_images(PixelRange(pixels.low.to(device), pixels.high.to(device)))


def read(extraction: Extraction, device: torch.device, batches: Iterable[Batch]) -> FeatureTable:
    """Read the blocks of all batches; raise ValueError if the network gives no answer or a block is not finite."""
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    kinds: list[str] = []
    groups: list[int] = []
    for x, own_kinds, sources in batches:
        found = [extraction(to_device(part, device)) for part in pieces(x, device)]
        logits = torch.cat([own for own, _ in found])
        blocks = {name: torch.cat([own[name] for _, own in found]) for name in found[0][1]}
        what = "challenges" if own_kinds[0] else "clean and calibration"
        # A class may be masked out by minus infinity, but not all classes.
        if failed := int((~logits.float().logsumexp(1).isfinite()).sum()):
            made = own_kinds[0] and sources[0] >= 0
            hint = ". They were generated: give the clip of the images, a loader of challenges, or None" if made else ""
            raise ValueError(
                f"{what} must give inputs that the network has an answer to; for {failed} it gave NaN or infinity{hint}"
            )
        if infinite := [name for name, value in blocks.items() if not value.float().isfinite().all()]:
            raise ValueError(f"{what} must give inputs whose blocks are finite; {infinite} were not")
        parts.append((logits.float().cpu(), {name: value.float().cpu() for name, value in blocks.items()}))
        kinds += own_kinds
        groups += sources
    return FeatureTable(
        {name: torch.cat([blocks[name] for _, blocks in parts]) for name in parts[0][1]},
        torch.cat([logits for logits, _ in parts]),
        np.array(kinds),
        np.array(groups),
    )
