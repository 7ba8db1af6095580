"""A model repository for NVIDIA's Triton Inference Server from an exported ONNX file.

    models/
      digits/
        config.pbtxt      inputs, outputs, batching; the file's description as the parameter ``fastgrad``
        labels.txt        where the file holds labels
        1/model.onnx

The server reads such a folder as it is (``tritonserver --model-repository=models``) and needs nothing of this package.
The schema is ``model_config.proto`` of https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fastgrad.deploy.file.onnx_file import Value, signature
from fastgrad.deploy.file.package import description_text, read_description, replace_atomically

_TYPES = {"float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float": "TYPE_FP32", "double": "TYPE_FP64"}


def write_repository(
    model: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: int = 1,
    max_batch: int = 32,
    max_delay: float = 0.002,
) -> Path:
    """Write a model's folder into a model repository; every file appears whole or not at all, the configuration last.

    Args:
        model: An ``.onnx`` written by `fastgrad.export`.
        repository: A folder; it is made if the folder it lies in exists.
        name: The model's name, letters, digits and ``_.-``; by default that of the file.
        version: A positive number; the server answers with the highest one that is there.
        max_batch: Largest batch that the server forms; at most the file's own.
        max_delay: Seconds for which a request may wait for others.

    Returns:
        The model's folder.

    Raises:
        MissingExtraError: The extra ``onnx`` is not installed.
        PackageError: ``model`` was not written by `fastgrad.export`.
        ValueError: An argument is not as above.
    """
    source, root = Path(model), Path(repository)
    if source.suffix != ".onnx":
        raise ValueError(f"model must end in .onnx; it was {str(source)!r}")
    if (root.exists() and not root.is_dir()) or not root.parent.is_dir():
        raise ValueError(
            f"repository must be a folder, or a new one in an existing folder; it was {str(root)!r}"
        )
    name = source.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name must be letters, digits and _.-; it was {name!r}")
    for key, value in (("version", version), ("max_batch", max_batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive int; it was {value!r}")
    if not 0 <= max_delay < 60:
        raise ValueError(f"max_delay must be seconds from 0 to 60; it was {max_delay!r}")
    description = read_description(source)
    inputs, outputs = signature(source)
    labels = description.labels
    config = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": min(max_batch, description.max_batch),
        "input": [_tensor(value) for value in inputs],
        "output": [
            _tensor(value)
            | ({"label_filename": "labels.txt"} if labels and value.name == "probabilities" else {})
            for value in outputs
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(1e6 * max_delay)},
        "parameters": {"key": "fastgrad", "value": {"string_value": description_text(description)}},
    }
    folder = root / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    replace_atomically(lambda file: shutil.copyfile(source, file), folder / str(version) / "model.onnx")
    if labels:
        lines = "".join(" ".join(label.splitlines()) + "\n" for label in labels)
        replace_atomically(lambda file: file.write_text(lines, "utf-8"), folder / "labels.txt")
    replace_atomically(lambda file: file.write_text(_message(config), "utf-8"), folder / "config.pbtxt")
    return folder


class _Word(str):
    """Written without quotes."""


def _tensor(value: Value) -> dict[str, Any]:
    """Without the batch, which the server adds; a shape of nothing else is one that it reshapes."""
    described = {"name": value.name, "data_type": _Word(_TYPES[value.dtype]), "dims": value.shape or [1]}
    return described if value.shape else {**described, "reshape": {"shape": []}}


def _message(fields: dict[str, Any], indent: str = "") -> str:
    """The text format of protocol buffers."""
    lines = []
    for key, value in fields.items():
        for each in value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]:
            if isinstance(each, dict):
                lines.append(f"{indent}{key} {{\n{_message(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {each if isinstance(each, _Word) else json.dumps(each)}\n")
    return "".join(lines)
