"""Keep expensive results in files: written whole or not at all, read only if they are what was asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastgrad.atomic import written_beside

Arrays = dict[str, NDArray[Any]]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise an error that names the file if it cannot be read."""
    try:
        yield
    except Exception as error:  # readers raise many kinds where a file was cut off or overwritten
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{path} must be a whole file; it cannot be read ({reason}). Delete it to have it made again"
        raise ValueError(message) from error


def arrays(path: Path, make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
    """Return the arrays in ``path``, or those that ``make`` returns, kept there."""
    if path.exists():
        with _reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    found = dict(make())
    _write(path, lambda file: np.savez(file, **found))  # type: ignore[arg-type]
    return found


def weights(path: Path, model: nn.Module, recipe: Mapping[str, Any], train: Callable[[nn.Module], object]) -> nn.Module:
    """Return ``model`` in evaluation mode with the weights in ``path``, or trained by ``train`` and kept there.

    A file that is damaged or holds a network of another recipe is a ValueError; the message names it.
    """
    if not path.exists():
        train(model)
        _write(path, lambda file: torch.save({"recipe": dict(recipe), "weights": model.state_dict()}, file))
        return model.eval()
    with _reading(path):
        kept = torch.load(path, weights_only=True)
    found = kept.get("recipe") if isinstance(kept, dict) else None
    if found != dict(recipe):
        raise ValueError(
            f"{path} must hold the network of the recipe {json.dumps(dict(recipe))}; it holds that of "
            f"{json.dumps(found)}. Delete it to have the network trained again"
        )
    with _reading(path):
        model.load_state_dict(kept["weights"])
    return model.eval()


def digest(*parts: object) -> str:
    """Return twelve hexadecimal digits of modules' weights, arrays, and whatever JSON can write."""
    total = sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                total.update(name.encode() + value.cpu().numpy().tobytes())
        elif isinstance(part, np.ndarray):
            total.update(part.tobytes())
        else:
            total.update(json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()[:12]


def _write(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file so that another process never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as file:
        write(file)
