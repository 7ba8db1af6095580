"""The data that a detector is fitted on: clean inputs drawn from a loader, challenges, and the blocks of both."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.batches import bar, batch_size, bytes_of, carrying, split_batch, take, to_device
from fastgrad.blocks.extraction import Extraction, Inputs
from fastgrad.challenges import PixelRange, iter_challenges
from fastgrad.detector.constants import CHALLENGED_TOGETHER


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Inputs drawn uniformly from a loader.

    Attributes:
        batches: The inputs, on the CPU; those of one batch have one shape.
        beside: What came beside each input: a label, the kind of a challenge, or None.
        seen: How many inputs the loader gave.
    """

    batches: list[Inputs]
    beside: list[Any]
    seen: int

    def __len__(self) -> int:
        return len(self.beside)

    def images(self) -> list[Tensor]:
        """The batches where they are images ``(B, C, H, W)``, floating; none where they are not."""
        images = [x for x in self.batches if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()]
        return images if len(images) == len(self.batches) else []


def draw(name: str, loader: Iterable[Any], limit: int, seed: int, *, verbose: bool | None = False) -> Drawn:
    """At most ``limit`` inputs of a loader, each as likely as any other, in one pass (a reservoir; Vitter, 1985).

    Args:
        name: Of the loader, for errors.
        loader: Batches, ``x`` or ``(x, something beside each input)``, or mappings with labels among the inputs.
        limit: Inputs that are kept.
        seed: Of the choice.
        verbose: Whether to show a progress bar; None: in a terminal.

    Raises:
        TypeError, ValueError: The loader is empty, or a batch is malformed.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, Inputs, Any, tuple[bool, ...], int]] = []
    seen, size = 0, 1
    for batch in bar(loader, name, verbose):
        x, given = split_batch(name, batch)
        count = batch_size(x)
        size = max(size, count)
        beside, leaves = _beside(name, given, count), pytree.tree_leaves(x)
        carriers = carrying(leaves, count)
        constants = [t for t, carries in zip(leaves, carriers, strict=True) if isinstance(t, Tensor) and not carries]
        same = hash((carriers, *map(bytes_of, constants)))
        for i in range(count):
            place = seen if seen < limit else int(rng.integers(seen + 1))
            seen += 1
            if place < limit:
                row = take(x, slice(i, i + 1), count, carriers)
                row = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), row)
                kept[place : place + 1] = [(seen, row, beside[i], carriers, same)]
    if not kept:
        raise ValueError(
            f"{name} must hold at least one batch; it was empty (an iterator can be read once: give a loader or list)"
        )
    # In the loader's order, and inputs of one shape together, with whatever else was the same for their batches.
    kept.sort(key=lambda entry: entry[0])
    shapes: dict[str, list[tuple[int, Inputs, Any, tuple[bool, ...], int]]] = {}
    for entry in kept:
        leaves = pytree.tree_leaves(entry[1])
        signature = str([(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in leaves]) + str(entry[-1])
        shapes.setdefault(signature, []).append(entry)
    batches, others = [], []
    for entries in shapes.values():
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            batches.append(_joined([row for _, row, *_ in part], entries[0][3]))
            others += [own for _, _, own, *_ in part]
    return Drawn(batches, others, seen)


def _beside(name: str, value: Any, count: int) -> list[Any]:
    if value is None or isinstance(value, Mapping):
        return [None] * count
    given = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if len(listed) != count:
        raise ValueError(
            f"{name} must give one label per input, or inputs alone; a batch had {count} inputs and {len(listed)}"
        )
    return listed


def _joined(rows: list[Inputs], carriers: tuple[bool, ...]) -> Inputs:
    """Rows of one shape as one batch; what carries no batch is the same for all."""
    flat = [pytree.tree_flatten(row) for row in rows]
    leaves = [
        torch.cat(values) if carries else values[0]
        for *values, carries in zip(*(leaves for leaves, _ in flat), carriers, strict=True)
    ]
    joined: Inputs = pytree.tree_unflatten(leaves, flat[0][1])
    return joined


def labels_of(name: str, drawn: Drawn, classes: int) -> NDArray[np.int64] | None:
    """Class indices ``(n,)`` where the loader gave labels.

    Raises:
        ValueError: Some inputs have none, or they are no class indices of at least two classes.
    """
    given = [value for value in drawn.beside if value is not None]
    if not given:
        return None
    wanted = f"{name} must give (x, labels), labels class indices from 0 to {classes - 1}, or inputs x alone"
    if len(given) < len(drawn):
        raise ValueError(f"{wanted}; {len(drawn) - len(given)} of {len(drawn)} inputs had no label")
    if classes < 2:
        raise ValueError(
            f"{name} must give inputs x alone for a network with one output, which has no classes to confuse; "
            "for two classes return two, torch.cat([torch.zeros_like(z), z], 1)"
        )
    values = np.asarray(given)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{wanted}; they were of shape {values.shape[1:]} each and {values.dtype}")
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(f"{wanted}; they went from {values.min()} to {values.max()}")
    if len(np.unique(values)) < 2:
        raise ValueError(f"{wanted}, of at least two classes; all {len(values)} were {values[0]}")
    return values.astype(np.int64)


def check_images(name: str, images: Sequence[Tensor]) -> None:
    """Raise ValueError where images are not finite, or say nothing because each has one colour throughout."""
    if not all(bool(x.isfinite().all()) for x in images):
        raise ValueError(f"{name} must give finite images; some held NaN or infinity")
    if images and all(bool((x.amax((2, 3)) == x.amin((2, 3))).all()) for x in images):
        raise ValueError(f"{name} must give images that show something; every one was constant")


@dataclasses.dataclass
class Features:
    """What was read of clean inputs and challenges; rows of clean inputs come first, in their order.

    Attributes:
        blocks: ``(n, ...)`` by name.
        logits: ``(n, N)``.
        kinds: Of each; empty for clean inputs.
        groups: Number of the clean input that each is or was made from; -1 for a challenge of the user's.
    """

    blocks: dict[str, Tensor]
    logits: Tensor
    kinds: NDArray[np.str_]
    groups: NDArray[np.intp]


class Reader:
    """Reads blocks batch by batch.

    Args:
        extraction: Network and blocks.
        device: Where to.
        verbose: Whether to show progress bars; None: in a terminal.
    """

    def __init__(self, extraction: Extraction, device: torch.device, *, verbose: bool | None) -> None:
        self.extraction, self.device, self.verbose = extraction, device, verbose
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._kinds: list[str] = []
        self._groups: list[int] = []

    def add(self, x: Inputs, kinds: Sequence[str], groups: Iterable[int]) -> None:
        """Read one batch; raise ValueError where the network gives NaN."""
        logits, blocks = self.extraction(to_device(x, self.device))
        if failed := int(logits.isnan().any(1).sum()):
            what = "challenges" if kinds[0] else "clean and calibration"
            raise ValueError(f"{what} must give inputs that the network has an answer to; for {failed} it gave NaN")
        self._parts.append((logits.float().cpu(), {name: value.float().cpu() for name, value in blocks.items()}))
        self._kinds += kinds
        self._groups += groups

    def clean(self, *samples: Drawn) -> None:
        """Read clean inputs."""
        for x in bar([x for drawn in samples for x in drawn.batches], "clean inputs", self.verbose):
            first = len(self._kinds)
            self.add(x, [""] * batch_size(x), range(first, first + batch_size(x)))

    def given(self, challenges: Drawn) -> None:
        """Read challenges of the user's; what came beside them tells kinds apart."""
        start = 0
        for x in bar(challenges.batches, "challenges", self.verbose):
            tags = challenges.beside[start : start + batch_size(x)]
            self.add(x, ["challenge" if tag is None else f"kind {tag}" for tag in tags], [-1] * batch_size(x))
            start += batch_size(x)

    def generated(
        self, model: nn.Module, clean: Drawn, chosen: NDArray[np.bool_], each: int, pixels: PixelRange | None, seed: int
    ) -> None:
        """Generate ``each`` challenges of every chosen clean input, and read them."""
        first = 0
        if pixels is not None:
            pixels = PixelRange(pixels.low.to(self.device), pixels.high.to(self.device))
        rows = [row for x in clean.images() for row in x.split(1)]
        parts: list[NDArray[np.intp]] = []
        for _, group in itertools.groupby(np.flatnonzero(chosen), key=lambda number: rows[number].shape):
            alike = np.array(list(group))
            parts += np.split(alike, range(CHALLENGED_TOGETHER, len(alike), CHALLENGED_TOGETHER))
        for numbers in bar(parts, "challenges", self.verbose):
            inputs = torch.cat([rows[number] for number in numbers]).to(self.device)
            for made in iter_challenges(model, inputs, each=each, first=first, seed=seed, pixels=pixels):
                self.add(made.inputs, made.kinds, numbers[made.sources.cpu().numpy() - first].tolist())
            first += len(inputs)

    def features(self) -> Features:
        """All that was read."""
        names = self._parts[0][1]
        return Features(
            {name: torch.cat([blocks[name] for _, blocks in self._parts]) for name in names},
            torch.cat([logits for logits, _ in self._parts]),
            np.array(self._kinds),
            np.array(self._groups),
        )
