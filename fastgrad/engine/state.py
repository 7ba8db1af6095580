"""What a forward pass changes beside its output: random numbers drawn, buffers written."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class RandomState:
    """The generators that ``module`` may draw from: PyTorch's on its devices, NumPy's and Python's."""

    def __init__(self, module: nn.Module) -> None:
        self._devices = sorted(
            {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}, key=str
        )
        self._torch = self._read()
        self._numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (the state that models draw from)
        self._python = random.getstate()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def same(self) -> bool:
        """Whether nothing was drawn since."""
        return (
            all(map(torch.equal, self._read(), self._torch))
            and random.getstate() == self._python
            and _same_numpy(np.random.get_state(legacy=False), self._numpy)  # noqa: NPY002
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self._torch[0])
        for device, state in zip(self._devices, self._torch[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


class Snapshot:
    """Random numbers and buffers before a forward pass, to take back what it does to them.

    Args:
        model: The user's model.
        training: Whether modules run in their own mode; buffers of those in training mode are expected to change.
        every: Whether to copy the other buffers as well.
    """

    def __init__(self, model: nn.Module, *, training: bool, every: bool = False) -> None:
        self._random = RandomState(model)
        self._buffers: list[tuple[Tensor, int, Tensor | None]] = []
        for module in model.modules():
            copied = every or (training and module.training)
            for buffer in module._buffers.values():
                if buffer is not None and not buffer.is_inference():
                    value = buffer.detach().clone() if copied else None
                    self._buffers.append((buffer, buffer._version, value))

    def restore(self) -> None:
        """Put everything back.

        Raises:
            ValueError: A buffer was written that had not been copied.
        """
        self._random.restore()
        with torch.no_grad():
            for buffer, version, value in self._buffers:
                if buffer._version == version:
                    continue
                if value is None:
                    raise ValueError(
                        "model must not write to its buffers in a call whose path was not seen before; "
                        f"a buffer of shape {tuple(buffer.shape)} was written. Make the same call again"
                    )
                buffer.copy_(value)


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Take back what forward passes do to random numbers and buffers."""
    before = Snapshot(model, training=True, every=True)
    try:
        yield
    finally:
        before.restore()


def _same_numpy(state: Any, other: Any) -> bool:
    one, two = state["state"], other["state"]
    same: bool = one["pos"] == two["pos"] and np.array_equal(one["key"], two["key"])
    return same
