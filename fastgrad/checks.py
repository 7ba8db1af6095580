"""Checks of arguments and of optional packages.

A message about an argument says what it must be and what it was; one about a package says how to install it.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

#: Dtypes that the kernels read, with Triton's names; they compute in float32.
KERNEL_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)

#: Device types without float64.
_NARROW_DEVICES = ("mps",)

Array = NDArray[np.float64]
_filters_lock = threading.RLock()
#: For messages: a tensor or a model given by mistake must not fill the screen.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    allowed = tuple(choices)
    if isinstance(value, np.ndarray) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; it was {_brief.repr(value)}")


def is_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; it was {type(value).__name__}")


def tensors(name: str, value: object) -> list[torch.Tensor]:
    """Return one tensor, or several, as a list; TypeError for anything else."""
    items = [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, Iterable) else None
    if items is None or not all(isinstance(item, torch.Tensor) for item in items):
        held = "" if items is None else f" of {', '.join(sorted({type(item).__name__ for item in items})) or 'nothing'}"
        raise TypeError(f"{name} must be a tensor or a sequence of tensors; it was {type(value).__name__}{held}")
    return items


def is_float(name: str, value: torch.Tensor) -> None:
    """Raise TypeError unless ``value`` is a tensor of a supported floating dtype."""
    is_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have a floating dtype ({supported}); it was {value.dtype}")


def is_a(kind: type, **values: object) -> None:
    """Raise TypeError for an argument that is not a ``kind``."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; it was {type(value).__name__}")


def is_path(**values: object) -> None:
    """Raise TypeError for an argument that is not a path."""
    for name, value in values.items():
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path; it was {_brief.repr(value)}")


def is_bool(**values: object) -> None:
    """Raise TypeError for an argument that is not a plain bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; it was {_brief.repr(value)}")


def holds_values(name: str, value: torch.Tensor) -> None:
    """Raise ValueError for a sparse or nested tensor, or one on the meta device."""
    if value.is_meta or value.is_nested or value.layout != torch.strided:
        what = "nested" if value.is_nested else f"of layout {value.layout}"
        what = "a tensor on the meta device" if value.is_meta else what
        raise ValueError(f"{name} must be dense and hold values; it was {what}")


def has_float64(name: str, value: torch.Tensor) -> None:
    """Raise ValueError for a tensor on a device without float64, which parts of the computation need."""
    if value.device.type in _NARROW_DEVICES:
        raise ValueError(f"{name} must be on a device with float64, such as the CPU; it was on {value.device}")


def is_loader(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` can be an iterable of batches."""
    if isinstance(value, (str, torch.Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a loader of batches; it was {type(value).__name__}")


def at_least(least: int, **values: object) -> None:
    """Raise ValueError for an argument that is not an integer or is below ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; it was {_brief.repr(value)}")


def is_seed(seed: object) -> None:
    """Raise ValueError unless NumPy accepts ``seed``."""
    at_least(0, seed=seed)
    if seed >= 2**32:  # type: ignore[operator]
        raise ValueError(f"seed must be below 2**32, as NumPy's are; it was {seed}")


def is_number(**values: object) -> None:
    """Raise TypeError for an argument that is not a real number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name} must be a number; it was {_brief.repr(value)}")


def lies_in(interval: str, **values: Any) -> None:
    """Raise TypeError for an argument that is not a real number, ValueError outside ``interval``, such as "(0, 1]"."""
    is_number(**values)
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must lie in {interval}; it was {_brief.repr(value)}")


def fits_utf8(text: str) -> bool:
    """Whether UTF-8 can encode ``text``; file names may contain bytes of other encodings."""
    return text.encode("utf-8", "ignore").decode() == text


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ValueError unless both tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; it was on {value.device}")


def shape_is(name: str, value: torch.Tensor | NDArray[Any], expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``value`` has exactly the ``expected`` shape; ``meaning`` says where it comes from."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({meaning}); it was {tuple(value.shape)}")


def to_array(name: str, value: Any, *, single: bool = False, finite: bool = True) -> Array:
    """Convert ``value``, which may be a tensor of any device and dtype, to float64; ``single`` keeps float32 as it is.

    TypeError if it is sparse or not numeric; ValueError if it is complex, ragged or, with ``finite``, not finite.
    """
    if hasattr(value, "toarray") and not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be dense; it was a sparse {type(value).__name__}: use .toarray()")
    try:
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu()
            value = (plain if plain.is_complex() or plain.dtype == torch.float32 else plain.double()).numpy()
        array = np.asarray(value)
        if array.dtype.kind == "c":
            raise ValueError("Complex data not supported")
        array = array if single and array.dtype == np.float32 else array.astype(np.float64)
    # Raised for sparse, meta and quantized tensors, ragged lists and values that are not numbers.
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be numeric; it was {type(value).__name__}: {error}") from error
    wrong = ~np.isfinite(array)
    if finite and wrong.any():
        rows = np.unique(np.argwhere(wrong)[:, 0]) if array.ndim else np.zeros(1, dtype=np.int64)
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise ValueError(
            f"{name} must be finite; it contains {what} (NaN or inf) in {len(rows)} rows, as in row {rows[0]}"
        )
    return array


def vector(name: str, value: Any, *, finite: bool = True) -> Array:
    """Convert ``value`` as `to_array` does; ValueError unless it is a vector that is not empty."""
    array = to_array(name, value, finite=finite)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a non-empty vector; its shape was {array.shape}")
    return array


def validated(estimator: Any, name: str, values: Any, *, reset: bool) -> Array:
    """Return a scikit-learn estimator's features as float64, ``(B, P)`` or with three dimensions.

    `sklearn.utils.validation.validate_data` checks matrices. ``reset`` stores the number of features, as it does.
    """
    from sklearn.utils.validation import validate_data

    array: Array
    if getattr(values, "ndim", None) != 3:
        values = to_array(name, values) if isinstance(values, torch.Tensor) else values
        array = validate_data(estimator, values, reset=reset, dtype=np.float64)
        return array
    array = to_array(name, values)
    if array.size == 0:
        raise ValueError(f"{name} must not be empty; it had shape {array.shape}")
    if reset:
        estimator.n_features_in_ = int(np.prod(array.shape[1:]))
    return array


def sources_of(sources: ArrayLike | None, count: int) -> NDArray[np.intp]:
    """Number the source of each of ``count`` samples; negative ones, and all for None, are sources of their own."""
    if sources is None:
        return np.arange(count)
    numbers = np.asarray(sources)
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
        raise ValueError(f"sources must be integers of shape ({count},); they were {numbers.dtype}, {numbers.shape}")
    alone = numbers < 0
    numbers = np.unique(numbers, return_inverse=True)[1]
    numbers[alone] = numbers.max(initial=0) + 1 + np.arange(alone.sum())
    return numbers


class MissingExtraError(ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that installs it."""


@contextlib.contextmanager
def without_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Suppress warnings of a category inside, in one thread at a time: warning filters belong to the process."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Raise MissingExtraError, which says ``pip install 'fastgrad[name]'``, if an import inside finds no package."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if isinstance(error, MissingExtraError) or missing.partition(".")[0] == "fastgrad":
            raise
        raise MissingExtraError(
            f"{missing} is not installed; it comes with: pip install 'fastgrad[{name}]'", name=missing
        ) from error
