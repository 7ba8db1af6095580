"""Check what a detector is given and bring it into one form: features, labels, kinds and held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from fastgrad import checks
from fastgrad.blocks import Block
from fastgrad.checks import Array, to_array
from fastgrad.detector import constants
from fastgrad.scores.rows import as_tensor

#: Blocks by name, which say how each is scored.
BlocksByName = Mapping[str, Block | type[Block]]


def check_blocks(X: Mapping[str, Any], by_name: BlocksByName, *, log: bool) -> dict[str, Tensor]:
    """Return named blocks as tensors of one length, float64 or float32, in the order of ``by_name``."""
    unknown = sorted(map(str, set(X) - set(by_name)))
    if unknown or not X:
        raise ValueError(f"X must have blocks named {', '.join(by_name)}; it had {', '.join(map(repr, X)) or 'none'}")
    arrays = {name: to_array(f"X[{name!r}]", X[name], single=True) for name in by_name if name in X}
    length = -1
    for name, array in arrays.items():
        block = by_name[name]
        if array.ndim not in block.ranks or array.size == 0:
            raise ValueError(f"X[{name!r}] must be a non-empty array of shape {block.shapes}; it was {array.shape}")
        if length not in (-1, len(array)):
            raise ValueError(f"X[{name!r}] must have as many rows as the other blocks, {length}; it had {len(array)}")
        length = len(array)
        if block.squared_norms and log:
            check_squared(f"X[{name!r}]", array)
    if "contrasts" in arrays and "logits" in arrays:
        classes, axis = arrays["logits"].shape[1], 2 if arrays["contrasts"].ndim == 4 else 1
        if arrays["contrasts"].shape[axis] != classes:
            raise ValueError(
                f"X['contrasts'] must have one entry per class on axis {axis}, {classes} like X['logits']; "
                f"it was {arrays['contrasts'].shape}"
            )
    return {name: as_tensor(array) for name, array in arrays.items()}


def check_squared(name: str, array: Array) -> None:
    """Raise ValueError if a squared norm is negative."""
    if (array < 0).any():
        raise ValueError(
            f"Negative values in data passed to UncertaintyDetector: {name} must hold squared norms, or set "
            f"log=False for features of any sign; the first is in row {np.argwhere(array < 0)[0][0]}"
        )


def challenging_of(y: ArrayLike | None, count: int) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Return which of ``count`` samples ``y`` calls challenging, and the two labels, the clean one first."""
    neither = np.zeros(count, dtype=bool), np.array([0, 1])
    if y is None:
        return neither
    values = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = column_or_1d(values, warn=True)
    if values.shape != (count,):
        raise ValueError(f"y must have shape ({count},), one label per row of X; it was {values.shape}")
    # Words are refused: nothing says which of two is clean, and the first in the alphabet would be.
    to_array("y", values)
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


def kinds_of(kinds: ArrayLike | None, challenging: NDArray[np.bool_]) -> list[str]:
    """Return an empty text for clean samples, and names of kinds of challenge; one kind if ``kinds`` is None."""
    values = challenging.astype(int) if kinds is None else np.asarray(kinds)
    if values.shape != challenging.shape:
        raise ValueError(f"kinds must have shape {challenging.shape}, like y; it was {values.shape}")
    return [f"kind {kind}" if other else "" for kind, other in zip(values.tolist(), challenging, strict=True)]


def held_out_of(
    held_out: ArrayLike | None,
    challenging: NDArray[np.bool_],
    sources: NDArray[np.intp],
    share: float | None,
    random: np.random.RandomState,
) -> NDArray[np.bool_]:
    """Return which clean samples only calibrate: those given, or one from each of a random ``share`` of their sources.

    A share of None means a fifth from 1,000 sources on, and no sample below.
    """
    if share is not None:
        checks.lies_in("(0, 1)", calibration_fraction=share)
    clean = np.flatnonzero(~challenging)
    if len(clean) < 4:
        raise ValueError(
            f"X must have at least 4 in-distribution samples; it had {len(clean)} (n_samples = {len(challenging)})"
        )
    mask = np.zeros(len(challenging), dtype=bool)
    if held_out is not None:
        given = np.asarray(held_out)
        if given.shape != challenging.shape or given.dtype != bool:
            raise ValueError(f"held_out must be bool of shape {challenging.shape}; it was {given.dtype}, {given.shape}")
        mask = given & ~challenging
        used = int(mask.sum())
        if used < 1 or len(clean) - used < 3:
            raise ValueError(
                "held_out must hold at least 1 in-distribution sample out and leave 3 to fit on; it held out "
                f"{used} and left {len(clean) - used}"
            )
        return mask
    # Only one sample per source: others would repeat it, but count as if they were independent.
    count = len(np.unique(sources[clean]))
    if share is None and count >= constants.SPLIT_FROM:
        share = constants.SPLIT_SHARE
    if share is not None:
        order = random.permutation(clean)
        each = order[np.sort(np.unique(sources[order], return_index=True)[1])]
        mask[each[: max(1, min(round(share * count), count - 3))]] = True
    return mask
