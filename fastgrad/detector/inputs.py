"""What a detector is given, checked and brought into one form: labels, kinds, rates, the held-out part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastgrad.scores.rows import as_tensor

Array = NDArray[np.float64]


class Split(NamedTuple):
    """Clean and challenging samples to fit on, and which of the calibrating ones that scores."""

    clean: NDArray[np.intp]
    challenging: NDArray[np.intp]
    scored: NDArray[np.intp]


def challenging_of(y: ArrayLike | None, count: int) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Which of ``count`` samples ``y`` calls challenging, and the two labels, the clean one first.

    Raises:
        ValueError: y has another length, is not finite, or does not hold 0 alone or two labels.
    """
    neither = np.zeros(count, dtype=bool), np.array([0, 1])
    if y is None:
        return neither
    values = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if values.ndim == 2 and values.shape[1] == 1:
        from sklearn.utils.validation import column_or_1d

        values = column_or_1d(values, warn=True)
    if values.shape != (count,):
        raise ValueError(f"y must have shape ({count},), one label per row of X; it was {values.shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("y must be finite; it contains NaN or infinity")
    classes = np.unique(values)
    if classes.tolist() == [-1, 1]:
        raise ValueError("y must be 0 (in-distribution) or 1 (challenging); it was scikit-learn's -1 and 1")
    if len(classes) == 1 and bool(classes[0] == 0):
        return neither
    if len(classes) != 2:
        raise ValueError(
            "Only binary classification is supported: y must hold two labels, 0 (in-distribution) and 1 "
            f"(challenging), or be None; it held {len(classes)} class(es): {classes[:5].tolist()}"
        )
    return values == classes[1], classes


def kinds_of(kinds: ArrayLike | None, challenging: NDArray[np.bool_]) -> NDArray[np.intp]:
    """0 for clean samples, 1 and up for kinds of challenge; one kind where ``kinds`` is None."""
    if kinds is None:
        return challenging.astype(np.intp)
    values = np.asarray(kinds)
    if values.shape != challenging.shape:
        raise ValueError(f"kinds must have shape {challenging.shape}, like y; it was {values.shape}")
    codes = np.zeros(len(values), dtype=np.intp)
    codes[challenging] = 1 + np.unique(values[challenging], return_inverse=True)[1]
    return codes


def deal(
    challenging: NDArray[np.bool_],
    held_out: ArrayLike | None,
    groups: ArrayLike | None,
    parts: int | float,
    random: np.random.RandomState,
) -> tuple[NDArray[np.intp], list[Split]]:
    """The clean samples that calibrate, in random order, and how each of them is scored.

    Held-out samples, or a random share of all if ``parts`` is less than 1, are scored by what is fitted on the others.
    With more parts every clean sample calibrates and fits: it is dealt, with its group, into one of so many folds, and
    what is fitted on the other folds scores it. No fit sees a challenging sample of a group that it scores.

    Raises:
        ValueError: There are fewer than 4 clean samples, or an argument is malformed, or leaves fewer than 2 clean
            samples on a side.
    """
    order = random.permutation(np.flatnonzero(~challenging))
    if len(order) < 4:
        raise ValueError(
            f"X must have at least 4 in-distribution samples; it had {len(order)} "
            f"(n_samples = {len(challenging)})"
        )
    numbers = np.arange(len(challenging)) if groups is None else np.asarray(groups)
    if numbers.shape != challenging.shape or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"groups must be integers of shape {challenging.shape}; they were {numbers.dtype}, {numbers.shape}"
        )
    if held_out is not None:
        mask = np.asarray(held_out)
        if mask.shape != challenging.shape or mask.dtype != bool:
            raise ValueError(
                f"held_out must be bool of shape {challenging.shape}; it was {mask.dtype}, {mask.shape}"
            )
        fold_of, folds = mask[order].astype(np.intp), [1]
        kept = int(fold_of.sum())
        if min(kept, len(order) - kept) < 2:
            raise ValueError(
                "held_out must leave at least 2 in-distribution samples on each side; it left "
                f"{kept} held out and {len(order) - kept} to fit on"
            )
    elif parts < 1:
        share = min(max(2, round(parts * len(order))), len(order) - 2)
        fold_of, folds = (np.arange(len(order)) < share).astype(np.intp), [1]
    else:
        # Groups in the order in which their first clean sample comes.
        _, first, inverse = np.unique(numbers[order], return_index=True, return_inverse=True)
        if len(first) < 2:
            raise ValueError(f"groups must tell at least 2 of clean samples apart; there was {len(first)}")
        count = min(int(parts), len(first))
        fold_of, folds = (np.argsort(np.argsort(first)) % count)[inverse], list(range(count))
    calibrating = np.isin(fold_of, folds)
    others = np.flatnonzero(challenging)
    splits = []
    for fold in folds:
        scored = order[fold_of == fold]
        apart = others[~np.isin(numbers[others], numbers[scored])]
        splits.append(Split(order[fold_of != fold], apart, np.flatnonzero(fold_of[calibrating] == fold)))
    return order[calibrating], splits


def check_rate(rate: float) -> float:
    """``rate`` as a float in (0, 1)."""
    if not isinstance(rate, (int, float, np.floating)) or not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate must lie in (0, 1); it was {rate!r}")
    return float(rate)


def take(blocks: Mapping[str, Array], indices: NDArray[np.intp]) -> dict[str, Array]:
    """The named rows of every block."""
    return {name: array[indices] for name, array in blocks.items()}


def as_tensors(blocks: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Every block as a tensor."""
    return {name: as_tensor(array) for name, array in blocks.items()}


def chunks(blocks: Mapping[str, Array], rows: int = 4096) -> Iterator[dict[str, torch.Tensor]]:
    """Slices of all blocks, so that a large set needs little memory."""
    for start in range(0, len(next(iter(blocks.values()))), rows):
        yield as_tensors({name: array[start : start + rows] for name, array in blocks.items()})
