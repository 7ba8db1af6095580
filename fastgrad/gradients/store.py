"""Rows of a data set on disk, written as the data go by and multiplied in blocks that fit memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad.atomic import written_beside
from fastgrad.batches import bytes_of
from fastgrad.gradients.project import digest_of_map

#: Bytes of rows that are read at once.
BLOCK_BYTES = 64 * 2**20


class GradientStore:
    """Rows of `grad_project` for a data set, in a folder: ``rows.f32`` and the index ``rows.json``.

    A row counts once the index says so, which happens after it is on disk. A process that is killed therefore loses at
    most the rows of its last `append`; opened again, the store goes on at ``len(store)``. One process writes at a time.

    Args:
        folder: Made if it does not exist.
        model: The network of the rows; the index keeps a digest of its parameters and buffers.
        size: K, the length of a row.
        seed: As given to `grad_project`.
        about: Whatever else the rows depend on, in words: the loss, the parameters, the data set, its order.

    Raises:
        TypeError, ValueError: For any other argument; also if the folder's rows are of another model, size or seed or
            about something else, or come from a version of this package or of PyTorch that maps gradients to other
            rows, or if its files are damaged.

    Example::

        store = fastgrad.GradientStore("rows", model, size=4096, about="cross-entropy, train in order")
        for x, y in DataLoader(Subset(train, range(len(store), len(train))), 128):
            with fastgrad.record(model):
                losses = F.cross_entropy(model(x), y, reduction="none")
                store.append(fastgrad.grad_project(losses, model, 4096))
        values, indices = store.topk(queries, 10)
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: nn.Module, *, size: int, seed: int = 0, about: str = ""
    ) -> None:
        checks.is_path(folder=folder)
        checks.is_a(nn.Module, model=model)
        checks.at_least(1, size=size)
        checks.is_seed(seed)
        checks.is_a(str, about=about)
        self._folder = Path(folder)
        self._about: dict[str, Any] = {
            "model": digest(model), "size": int(size), "seed": int(seed), "about": about,
            "map": digest_of_map(int(size), int(seed)),
        }  # fmt: skip
        self.size = int(size)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows = self._read() if self._index.exists() else 0

    @property
    def _index(self) -> Path:
        return self._folder / "rows.json"

    @property
    def _data(self) -> Path:
        return self._folder / "rows.f32"

    def __len__(self) -> int:
        """Return how many rows are stored, which is where a killed run goes on."""
        return self._rows

    def _read(self) -> int:
        """Return the index's number of rows; ValueError if it is of other rows than these."""
        try:
            found = json.loads(self._index.read_text())
            rows = found.pop("rows")
            valid = type(rows) is int and rows >= 0
        except (ValueError, KeyError, AttributeError, TypeError):
            valid = False
        if not valid:
            raise ValueError(f"folder must hold an index that can be read; {self._index} was damaged")
        for name, value in self._about.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{name} must be that of the rows in {self._folder}, {found.get(name)!r}; it was {value!r}"
                )
        held = self._data.stat().st_size if self._data.exists() else 0
        if held < 4 * rows * self.size:
            raise ValueError(f"folder must hold the {rows} rows that its index names; {self._data} had {held} bytes")
        return int(rows)

    def append(self, rows: Tensor) -> None:
        """Write the next rows.

        Args:
            rows: ``(b, K)``, stored in float32.

        Raises:
            TypeError, ValueError: For anything else, and for numbers that are not finite in float32.
            RuntimeError: If another process wrote to the folder since it was opened.
        """
        self._check("rows", rows)
        values = rows.detach().to("cpu", torch.float32)
        if not bool(values.isfinite().all()):
            raise ValueError("rows must hold finite numbers in float32; some were not")
        if (self._read() if self._index.exists() else 0) != self._rows:
            raise RuntimeError(f"another process wrote to {self._folder}; open it again")
        with open(self._data, "r+b" if self._data.exists() else "x+b") as file:
            # What a killed process wrote after its last row that counts is written over.
            file.seek(4 * self._rows * self.size)
            file.write(values.contiguous().numpy().astype("<f4", copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        with written_beside(self._index) as beside:
            beside.write_text(json.dumps({**self._about, "rows": self._rows + len(values)}) + "\n")
        self._rows += len(values)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a first row and a block of rows ``(b, K)``, in order."""
        if not self._rows:
            return
        held = np.memmap(self._data, "<f4", "r", shape=(self._rows, self.size))
        step = max(1, BLOCK_BYTES // (4 * self.size))
        for first in range(0, self._rows, step):
            yield first, torch.from_numpy(np.array(held[first : first + step], dtype=np.float32))

    def __matmul__(self, queries: Tensor) -> Tensor:
        """Return ``(N, Q)`` inner products of all rows with the columns of ``queries`` ``(K, Q)``, in float32."""
        checks.is_tensor("queries", queries)
        if queries.dim() != 2:
            raise ValueError(f"queries must have shape ({self.size}, Q); it was {tuple(queries.shape)}")
        self._check("queries", queries.mT, "Q")
        columns = queries.detach().to("cpu", torch.float32)
        return torch.cat([columns.new_zeros(0, columns.shape[1]), *(rows @ columns for _, rows in self.blocks())])

    def topk(self, queries: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """Return the k largest (or smallest) inner products with each query, and the numbers of their rows.

        Args:
            queries: ``(Q, K)``, rows of `grad_project` with the same seed and size.
            k: At most ``len(store)``.
            largest: Whether the largest are wanted, or else the smallest.

        Returns:
            Values in float32 and indices in int64, both ``(Q, k)``, best first.

        Raises:
            TypeError, ValueError: For anything else.
        """
        self._check("queries", queries, "Q")
        checks.at_least(1, k=k)
        checks.is_bool(largest=largest)
        if k > self._rows:
            raise ValueError(f"k must be at most the number of rows, {self._rows}; it was {k}")
        own = queries.detach().to("cpu", torch.float32)
        values, indices = own.new_zeros(len(own), 0), own.new_zeros(len(own), 0, dtype=torch.int64)
        for first, rows in self.blocks():
            numbers = torch.arange(first, first + len(rows), device="cpu").expand(len(own), -1)
            values, indices = torch.cat([values, own @ rows.mT], 1), torch.cat([indices, numbers], 1)
            values, at = values.topk(min(k, values.shape[1]), largest=largest)
            indices = indices.gather(1, at)
        return values, indices

    def _check(self, name: str, value: Tensor, rows: str = "b") -> None:
        checks.is_float(name, value)
        checks.holds_values(name, value)
        if value.dim() != 2 or value.shape[1] != self.size:
            raise ValueError(f"{name} must have shape ({rows}, {self.size}); it was {tuple(value.shape)}")


def digest(model: nn.Module) -> str:
    """Return a hash of the names, shapes, dtypes and values of a model's parameters and buffers."""
    found = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(bytes_of(value))
    return found.hexdigest()
