"""Clean and challenging samples of a fit: their blocks, their kinds, and what each is for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.batches import bar, batch_size, first_input, take, to_device
from fastgrad.blocks.extraction import Extraction, Inputs
from fastgrad.challenges import PixelRange, iter_challenges

#: Share of the clean inputs that are held out while blocks are chosen.
_HELD_OUT = 0.4
#: Generated challenges of held-out images, from which the worth of blocks is measured; more say little more.
_JUDGED = 1200
#: Challenges that are made in all, as long as an image gives no more than so many and no fewer.
_WANTED, _FEWEST, _MOST = 2000, 2, 4


@dataclass
class Samples:
    """What a detector is fitted on.

    Attributes:
        parts: Blocks of every batch.
        kinds: Of every sample; empty for clean ones.
        held_out: Whether a sample calibrates (clean) or judges (challenging) rather than fits.
        groups: The place of every clean sample, and of the clean sample that a challenge was made from, or -1.
        labels: Of every clean sample, or -1.
    """

    parts: list[dict[str, Tensor]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(
        self,
        blocks: Mapping[str, Tensor],
        kinds: Iterable[str],
        held_out: Iterable[bool],
        groups: Iterable[int],
        labels: Tensor | None = None,
    ) -> None:
        """Append one batch."""
        self.parts.append({name: value.float().cpu() for name, value in blocks.items()})
        self.kinds += kinds
        self.held_out += held_out
        self.groups += groups
        missing = len(self.kinds) - len(self.labels)
        self.labels += [-1] * missing if labels is None else labels.tolist()

    def blocks(self) -> dict[str, Tensor]:
        """Every block of all samples."""
        return {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}


@dataclass(frozen=True)
class Sources:
    """Where samples come from: arguments of `TwoStageModel.fit`, and how many clean images are expected."""

    train: Iterable[Any]
    challenge: Iterable[Any] | None
    calibration: Iterable[Any] | None
    max_samples: int
    images: int
    challenges_per_image: int | None
    seed: int
    verbose: bool


def expected(loader: Iterable[Any], batch: int) -> int:
    """How many inputs a loader holds, from its length if it has one and the size of its first batch."""
    return len(loader) * batch if isinstance(loader, Sized) else _WANTED


def collect(extraction: Extraction, model: nn.Module, device: torch.device, sources: Sources) -> Samples:
    """Run all batches of the sources, and the challenges generated from them where none are given.

    Raises:
        ValueError: A loader is empty or malformed, or challenges cannot be made from the inputs.
    """
    samples, rng = Samples(), np.random.default_rng(sources.seed)
    generating = sources.challenge is None
    share = _HELD_OUT if sources.calibration is None else 0.0
    turns = {False: 0, True: 0}
    # More of each image where there are few.
    each = sources.challenges_per_image or max(_FEWEST, min(_MOST, -(-_WANTED // max(1, sources.images))))
    judged = 0

    def add(
        x: Inputs,
        kind: str,
        held_out: NDArray[np.bool_],
        groups: NDArray[np.intp],
        labels: Tensor | None = None,
    ) -> None:
        logits, blocks = extraction(to_device(x, device))
        samples.add(blocks, [kind] * len(logits), held_out.tolist(), groups.tolist(), labels)

    def generate(x: Tensor, numbers: NDArray[np.intp], chosen: NDArray[np.bool_], held_out: bool) -> None:
        if not chosen.any():
            return
        # The whole batch says where black and white lie.
        x = x.to(device)
        pixels = PixelRange.of(x)
        own, places = x[torch.as_tensor(np.flatnonzero(chosen), device=device)], numbers[chosen]
        first, seed = turns[held_out], sources.seed + held_out * 10**6
        turns[held_out] += len(own)
        for made in iter_challenges(model, own, each=each, first=first, seed=seed, pixels=pixels):
            logits, blocks = extraction(made.inputs)
            held = [held_out] * len(logits)
            samples.add(blocks, made.kinds, held, places[made.sources.numpy() - first].tolist())

    for x, labels in _batches("train_loader", sources.train, sources.max_samples, sources.verbose):
        kept = rng.random(batch_size(x)) < share
        numbers = len(samples.kinds) + np.arange(batch_size(x))
        add(x, "", kept, numbers, labels)
        if generating:
            if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
                raise ValueError(
                    "challenges can be generated from images (B, C, H, W) only; pass challenge_loader or "
                    "challenge_loader=() to fit on clean data alone"
                )
            generate(x, numbers, ~kept, False)
            if judged < _JUDGED:
                generate(x, numbers, kept, True)
                judged += each * int(kept.sum())
    if not samples.kinds:
        raise ValueError("train_loader must hold at least one batch; it was empty")
    if sources.calibration is not None:
        before = len(samples.kinds)
        for x, labels in _batches(
            "calibration_loader", sources.calibration, sources.max_samples, sources.verbose
        ):
            everything, numbers = np.ones(batch_size(x), bool), len(samples.kinds) + np.arange(batch_size(x))
            add(x, "", everything, numbers, labels)
            if generating and isinstance(x, Tensor) and judged < _JUDGED:
                generate(x, numbers, everything, True)
                judged += each * batch_size(x)
        if len(samples.kinds) == before:
            raise ValueError("calibration_loader must hold at least one batch; it was empty")
    if sources.challenge is not None:
        limit = sources.max_samples
        for x, tags in _batches("challenge_loader", sources.challenge, limit, sources.verbose, labels=False):
            add(x, "challenge", np.zeros(batch_size(x), bool), np.full(batch_size(x), -1))
            if tags is not None:
                samples.kinds[-batch_size(x) :] = [f"kind {tag}" for tag in tags]
    return samples


def _batches(
    name: str, loader: Iterable[Any], limit: int, verbose: bool, *, labels: bool = True
) -> Iterator[tuple[Inputs, Any]]:
    """Inputs and what came with them, ``limit`` samples at most: labels ``(B,)``, or a list of any tags."""
    count = 0
    for batch in bar(loader, name.partition("_")[0], verbose):
        x = first_input(name, batch)
        x = take(x, slice(0, limit - count), batch_size(x))
        beside = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        if labels:
            yield x, _labels(beside, batch_size(x))
        else:
            named = beside.tolist() if isinstance(beside, Tensor) else beside
            yield x, None if named is None else list(named)[: batch_size(x)]
        count += batch_size(x)
        if count >= limit:
            return


def _labels(value: Any, count: int) -> Tensor | None:
    """Integer labels ``(B,)`` where a batch carries them."""
    if value is None or isinstance(value, Mapping):
        return None
    tensor = torch.as_tensor(value)
    return tensor[:count].cpu() if tensor.dim() == 1 and not tensor.is_floating_point() else None
