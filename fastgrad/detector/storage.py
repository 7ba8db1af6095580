"""Fitted modules on disk: safetensors with JSON metadata and a digest over every byte. No pickle, no code.

The metadata of the ``.safetensors`` has one entry, ``fastgrad``, a JSON text. It holds the SHA-256 of the whole file
(computed with 64 zeros in its place), the format number, the description of the modules
(`fastgrad.scores.fitted.Fitted.spec`), and whatever else the caller stores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import original
from fastgrad.atomic import written_beside
from fastgrad.batches import bytes_of
from fastgrad.scores.fitted import Fitted, rebuild

FORMAT = 4
#: What reading a description raises if someone has altered it and written the digest anew.
ALTERED = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError)
_KEY = "fastgrad"
_EMPTY = "0" * 64


def save(path: str | os.PathLike[str], modules: Mapping[str, Fitted], extra: Mapping[str, Any]) -> Path:
    """Write ``modules`` and ``extra`` (JSON) to ``path``; the file appears whole or not at all."""
    from safetensors.torch import save as serialise

    checks.is_path(path=path)
    target = Path(path)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    content = {
        "digest": _EMPTY,
        "format": FORMAT,
        "modules": {name: module.spec() for name, module in modules.items()},
        "extra": dict(extra),
    }
    data = serialise(tensors, {_KEY: json.dumps(content)})
    digest = hashlib.sha256(data).hexdigest()
    with written_beside(target) as file:
        file.write_bytes(data.replace(_EMPTY.encode(), digest.encode(), 1))
    return target


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Fitted], dict[str, Any]]:
    """Return modules and extras of a file; ValueError if it was changed, or not written by `save` of this format."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    foreign = f"path must be a file written by TwoStageModel.save; {str(path)!r} is not one"
    if Path(path).exists() and not Path(path).is_file():
        # A pipe would never end.
        raise ValueError(foreign)
    data = Path(path).read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"][_KEY])
        digest, number = content["digest"].encode(), content["format"]
    except ALTERED as error:
        raise ValueError(foreign) from error
    original = data.replace(digest, _EMPTY.encode(), 1)
    if hashlib.sha256(original).hexdigest().encode() != digest:
        raise ValueError(f"{str(path)!r} has been changed or damaged since it was saved: its digest does not match")
    if number != FORMAT:
        raise ValueError(f"{str(path)!r} has format {number!r}; this version of fastgrad reads format {FORMAT}")
    try:
        tensors: dict[str, Tensor] = deserialise(data)
        modules = {name: rebuild(spec, tensors, f"{name}.") for name, spec in content["modules"].items()}
        extra = dict(content["extra"])
    except (SafetensorError, *ALTERED) as error:
        raise ValueError(foreign) from error
    return modules, extra


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(original(model).state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(bytes_of(value))
    return digest.hexdigest()
