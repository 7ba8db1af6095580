"""The checks that a feature matrix passes, plain or as the named blocks of `fastgrad.blocks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse

from fastgrad.blocks import BLOCKS

Array = NDArray[np.float64]


def to_array(name: str, value: Any) -> Array:
    """``value`` as a float64 array; tensors of any device and dtype are accepted.

    Raises:
        TypeError: It is sparse, complex or not numeric.
        ValueError: It holds NaN or infinity.
    """
    if issparse(value):
        raise TypeError(f"{name} must be dense; it was a sparse {type(value).__name__}: use .toarray()")
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} must be real; it was {array.dtype}")
    try:
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be numeric; it was an array of {array.dtype}: {error}") from error
    finite = np.isfinite(array)
    if not finite.all():
        rows = np.unique(np.argwhere(~finite)[:, 0]) if array.ndim else np.zeros(1, dtype=np.int64)
        kind = "NaN" if np.isnan(array).any() else "infinity"
        raise ValueError(
            f"{name} must be finite; it contains {kind} (NaN or inf) in {len(rows)} rows, as in row {rows[0]}"
        )
    return array


def check_blocks(X: Mapping[str, Any], *, log: bool) -> dict[str, Array]:
    """Named blocks as float64 arrays of one length.

    Raises:
        ValueError: No block, an unknown one, a wrong rank, different lengths, or a negative squared norm.
    """
    unknown = sorted(map(str, set(X) - set(BLOCKS)))
    if unknown or not X:
        raise ValueError(
            f"X must have blocks named {', '.join(BLOCKS)}; it had {', '.join(map(repr, X)) or 'none'}"
        )
    arrays = {name: to_array(f"X[{name!r}]", X[name]) for name in BLOCKS if name in X}
    length = -1
    for name, array in arrays.items():
        ranks, shapes = BLOCKS[name].ranks, BLOCKS[name].shapes
        if array.ndim not in ranks or array.size == 0:
            raise ValueError(f"X[{name!r}] must be a non-empty array of shape {shapes}; it was {array.shape}")
        if length not in (-1, len(array)):
            raise ValueError(
                f"X[{name!r}] must have as many rows as the other blocks, {length}; it had {len(array)}"
            )
        length = len(array)
        if BLOCKS[name].squared_norms and log:
            check_squared(f"X[{name!r}]", array)
    if "contrasts" in arrays and "logits" in arrays:
        classes, contrasts = arrays["logits"].shape[1], contrast_axis(arrays["contrasts"])
        if arrays["contrasts"].shape[contrasts] != classes:
            raise ValueError(
                f"X['contrasts'] must have one entry per class on axis {contrasts}, {classes} like "
                f"X['logits']; it was {arrays['contrasts'].shape}"
            )
    return arrays


def check_squared(name: str, array: Array) -> None:
    """Raise ValueError where a squared norm is negative."""
    if (array < 0).any():
        row = int(np.argwhere(array < 0)[0][0])
        raise ValueError(
            f"Negative values in data passed to UncertaintyDetector: {name} must hold squared norms, or set "
            f"log=False if it holds their logarithms; the first is in row {row}"
        )


def contrast_axis(array: Array) -> int:
    """The axis of a contrast block along which the classes lie."""
    return 2 if array.ndim == 4 else 1


def are_contrasts(array: Array) -> bool:
    """Whether axis 1 of ``array`` ``(B, N)`` or ``(B, N, P)`` runs over contrast classes.

    The smallest squared norm of a sample belongs to the class that the network predicts, so over a data set
    of several classes its place moves. Over parameter sets or signals, each with its own scale, it stays.
    The rule: the place's entropy is more than half of the largest possible one.
    """
    if array.shape[1] < 2:
        return False
    values = array if array.ndim == 2 else array.mean(axis=tuple(range(2, array.ndim)))
    counts = np.bincount(values.argmin(1), minlength=array.shape[1]) / len(array)
    present = counts[counts > 0]
    return bool(-(present * np.log(present)).sum() > 0.5 * np.log(array.shape[1]))
