"""Addresses, uninitialised reads and races, from a shadow of every byte that a launch may touch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.sanitize.interpreter import Watcher
from fastgrad.ops.triton import devices

#: Elements of poison on either side of an operand.
MARGIN = 64


class SanitizerError(AssertionError):
    """A memory operation that a kernel must not make."""


def poison(dtype: torch.dtype) -> float | int:
    """NaN, or an integer that is no valid index."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor: Tensor, pad: int = 0) -> Tensor:
    """A copy with the same numbers, rows ``pad`` elements further apart, poison between them and on both sides."""
    strides = list(torch.empty(tensor.shape).stride()) if pad else list(tensor.stride())
    if pad and tensor.dim() > 1:
        strides[0] += pad
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) if tensor.numel() else 0
    flat = torch.full((reach + 2 * MARGIN,), poison(tensor.dtype), dtype=tensor.dtype)
    view = flat.as_strided(tensor.shape, strides, MARGIN)
    view.copy_(tensor)
    return view


def _addresses(tensor: Tensor) -> np.ndarray:
    """Of every element."""
    offsets = np.zeros((1,) * tensor.dim(), np.int64)
    for axis, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[axis] = n
        offsets = offsets + (np.arange(n, dtype=np.int64) * stride).reshape(shape)
    return (tensor.data_ptr() + offsets * tensor.itemsize).ravel()


class _Region:
    """The shadow of one allocation.

    Attributes:
        width: Bytes of the element that starts at a byte, 0 where none does.
        written: Whether a byte holds something.
        writer, reader: Program that did so last in this launch, -1 before.
        epoch, read_epoch: The program's number of releases then.
    """

    def __init__(self, tensor: Tensor, fresh: bool, constant: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept, so that no other allocation takes its place
        self.base, self.size, self.constant = self.storage.data_ptr(), self.storage.nbytes(), constant
        self.width = np.zeros(self.size, np.int8)
        self.written = np.full(self.size, not fresh)
        self.begin()

    def begin(self) -> None:
        self.writer, self.reader = np.full(self.size, -1), np.full(self.size, -1)
        self.epoch, self.read_epoch = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)


class Memory(Watcher):
    """Checks every memory operation of the launches that it watches.

    Two programs that touch one address, at least one of them writing, must be ordered: an atomic operation with acquire
    and release semantics hands on what its program and those before it at the same address have seen.

    Args:
        inputs: Tensors that no kernel may write.
        order: From the number of programs to the order in which they run.
    """

    def __init__(self, inputs: Sequence[Tensor], order: Callable[[int], Sequence[int]] = range) -> None:
        self.order = order
        self.regions: dict[int, _Region] = {}
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.fresh: set[int] = set()
        self.operations = 0

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """What launchers allocate inside holds poison, has margins and counts as never written."""
        plain = devices.empty

        def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
            made = guarded(torch.full(tuple(shape), poison(dtype), dtype=dtype))
            self.regions[made.untyped_storage().data_ptr()] = _Region(made, True, False)
            return made

        devices.empty = empty
        try:
            yield
        finally:
            devices.empty = plain

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        """Shadow the operands of a launch."""
        self.kernel = kernel
        for tensor in arguments.values():
            if isinstance(tensor, Tensor):
                base = tensor.untyped_storage().data_ptr()
                if base not in self.regions:
                    self.regions[base] = _Region(tensor, False, base in self.inputs)
                self.regions[base].width[_addresses(tensor) - base] = tensor.itemsize
        for region in self.regions.values():
            region.begin()
        self.bases = np.array(sorted(self.regions))
        #: What each program knows of each other's releases, and what each atomic address hands on.
        self.seen = np.eye(programs, dtype=np.int64)
        self.handed: dict[int, np.ndarray] = {}
        return self.order(programs)

    def run(self, programs: Sequence[int], body: Callable[[], None], select: Callable[[int], None]) -> None:
        """Run programs one after the other."""

        def chosen(program: int) -> None:
            self.program = program
            select(program)

        super().run(programs, body, chosen)

    def load(self, addresses: np.ndarray, width: int) -> None:
        """Check a read."""
        for region, at in self._located(addresses, width, "reads"):
            if not region.written[at].all():
                raise SanitizerError(f"{self.kernel}: program {self.program} reads what nobody wrote")
            self._ordered(region.writer[at], region.epoch[at], "reads what program {} writes")
            region.reader[at], region.read_epoch[at] = self.program, self.seen[self.program, self.program]

    def store(self, addresses: np.ndarray, width: int) -> bool:
        """Check a write."""
        for region, at in self._located(addresses, width, "writes"):
            if region.constant:
                raise SanitizerError(f"{self.kernel}: program {self.program} writes an input")
            self._ordered(region.writer[at], region.epoch[at], "writes what program {} writes")
            self._ordered(region.reader[at], region.read_epoch[at], "writes what program {} reads")
            region.written[at] = True
            region.writer[at], region.epoch[at] = self.program, self.seen[self.program, self.program]
        return False

    def atomic(self, addresses: np.ndarray, ordered: bool) -> None:
        """Check an atomic operation, and hand on what its program has seen."""
        for _ in self._located(addresses, 4, "changes"):
            pass
        if ordered:
            mine = self.seen[self.program]
            for address in addresses.tolist():
                np.maximum(mine, self.handed.get(address, mine), out=mine)
                self.handed[address] = mine.copy()
            mine[self.program] += 1

    def _located(self, addresses: np.ndarray, width: int, does: str) -> list[tuple[_Region, np.ndarray]]:
        """Regions and the bytes in them; a fault for an address that is no element."""
        self.operations += 1
        addresses = addresses.astype(np.int64).ravel()
        index = np.searchsorted(self.bases, addresses, "right") - 1
        located = []
        for i in np.unique(index):
            base = int(self.bases[i])
            region, at = self.regions[base], addresses[index == i] - base
            if i < 0 or (at >= region.size).any() or (region.width[at] != width).any():
                raise SanitizerError(
                    f"{self.kernel}: program {self.program} {does} {width} bytes that no operand holds"
                )
            located.append((region, at))
        return located

    def _ordered(self, programs: np.ndarray, epochs: np.ndarray, does: str) -> None:
        """A fault if a program's earlier operation was not handed on to this one."""
        before = (programs >= 0) & (programs != self.program)
        late = before & (epochs > self.seen[self.program][programs])
        if late.any():
            raise SanitizerError(
                f"{self.kernel}: program {self.program} {does.format(programs[late][0])}, and nothing orders them"
            )
