"""The contents of an ONNX file of this package, and how it is run.

The graph takes ``input`` ``(batch, ...)``, normalized, and returns what `outputs_of` names. The description is a JSON
text under the key ``fastgrad`` of the file's ``metadata_props``. It runs without PyTorch and without this package.

The last entry, ``fastgrad.sha256``, is a checksum of all bytes before it. ONNX has none, so a flipped bit in a weight
would go unnoticed. Remove that entry if you change a file on purpose.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.checks import extra
from fastgrad.deploy.file.opening import open_regular

INPUT = "input"
KEY = "fastgrad"
#: Key of the entry with the SHA-256, in hexadecimal digits.
SUM = "fastgrad.sha256"
#: Protocol buffers have fewer bytes.
LARGEST = 2**31


def runtime() -> Any:
    """Return ``onnxruntime``, imported without telemetry unless the environment says otherwise.

    Telemetry would keep a database in the home folder and write ``$TMPDIR/.ses``, a name that others can foresee.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with extra("onnx"):
        import onnxruntime
    return onnxruntime


def load(path: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]]:
    """Return the function in an ONNX file, on the CPU, with as many threads as PyTorch uses.

    RuntimeError if the file is damaged, or ONNX Runtime cannot read or run it; the message says why.
    """
    onnxruntime = runtime()
    _check_sum(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A memory pattern reserves a place for every result of a pass, for each batch size, and saves no time.
    options.enable_mem_pattern = False
    # The runtime warns only of its own optimizations.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error

    def run(x: Tensor) -> list[Tensor]:
        try:
            return [torch.from_numpy(value) for value in session.run(None, {INPUT: x.numpy(force=True)})]
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error

    return run


def sum_entry(digits: str) -> bytes:
    """Return an entry of ``metadata_props``, field 14, encoded as a protocol buffer to append to a message."""
    entry = b"\n%c%s\x12%c%s" % (len(SUM), SUM.encode(), len(digits), digits.encode())
    return b"%c%c%s" % (14 << 3 | 2, len(entry), entry)


def _check_sum(path: str | os.PathLike[str]) -> None:
    """Raise RuntimeError if the bytes do not match the checksum; a file without it passes."""
    total = hashlib.sha256()
    left = os.path.getsize(path) - len(sum_entry(total.hexdigest()))
    with open_regular(path) as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            total.update(block)
            left -= len(block)
        last = file.read()
    expected = sum_entry(total.hexdigest())
    if last != expected and last[:-64] == expected[:-64]:
        raise RuntimeError("it is damaged, or was changed after it was written: its SHA-256 is another")


def read_metadata(path: str | os.PathLike[str]) -> str | None:
    """Return the description's text in an ONNX file, or None.

    RuntimeError if the file is damaged, or keeps data in other files, which no checksum would cover.
    """
    with extra("onnx"):
        import onnx
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size >= LARGEST:
                raise ValueError(f"protocol buffers have less than {LARGEST} bytes")
            model = onnx.load(file, "protobuf", load_external_data=False)
    except Exception as error:
        raise RuntimeError(f"it is not a whole ONNX file: {error}") from error
    if not model.HasField("graph"):
        raise RuntimeError("it holds no graph")
    if any(isinstance(part, onnx.TensorProto) and (part.external_data or part.data_location) for part in _parts(model)):
        raise RuntimeError("it keeps data in another file; export it in one")
    texts = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if len(texts) > 1:
        raise RuntimeError(f"it holds {KEY!r} twice")
    return texts[0] if texts else None


def _parts(message: Any) -> Iterator[Any]:
    """Yield all messages nested in a message."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                yield part
                yield from _parts(part)
