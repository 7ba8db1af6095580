"""One run of a model on a batch, kept until its graph is gone, and hints of how to run a model without trying first."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastgrad.engine.outputs import Place
from fastgrad.layers.call import Call


class Alone:
    """One sample that ran without vmap; autograd gives its gradients from its own ``outputs``.

    ``thawed`` are copies of frozen parameters that require gradients, by the ids of the originals.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[int, Tensor]) -> None:
        frozen = {key: p for key, p in parameters.items() if not p.requires_grad}
        self.thawed = {key: p.detach().clone().requires_grad_() for key, p in frozen.items()}
        self.outputs: list[Tensor] = []
        self._model, self._frozen = model, frozen

    def original(self, value: Tensor) -> Tensor:
        """Return the frozen parameter of which ``value`` is the copy, or ``value``."""
        return next((self._frozen[key] for key, copy in self.thawed.items() if copy is value), value)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the model use the thawed copies inside."""
        tables = [module._parameters for module in self._model.modules()] if self.thawed else []
        places = [(table, name, p) for table in tables for name, p in table.items() if id(p) in self.thawed]
        try:
            for table, name, p in places:
                table[name] = self.thawed[id(p)]  # type: ignore[assignment]
            yield
        finally:
            for table, name, p in places:
                table[name] = p


@dataclass(eq=False)
class Recorded:
    """A run of a model on a batch; it lives as long as the graph of its outputs."""

    parameters: Mapping[int, Tensor]
    samples: int
    #: For each part of the batch: which samples (None for all in order), and how they ran.
    parts: list[tuple[Tensor | None, Call | Alone]] = field(default_factory=list)
    #: Nodes of the graph behind the call: of its inputs, and of earlier calls whose results it read.
    inputs: list[Any] = field(default_factory=list)
    #: Where the batch is in each output, and whether it holds rows of samples at all.
    places: list[Place] = field(default_factory=list)
    rows: list[bool] = field(default_factory=list)
    #: Whether all inputs that carry the batch have one dimension, and so may hold positions.
    lines: bool = False
    #: Why samples ran one by one; empty if they did not.
    alone_reason: str = ""
    #: Whether gradients may not be proportional to those of the outputs, because of custom functions or hooks.
    custom_backward: bool = False
    #: Whether several gradients can go back in one pass.
    batched_backward: bool = False
    #: Restores what the call wrote, if it has to leave the model as it was.
    restore: Callable[[], None] | None = None

    @property
    def hooked(self) -> bool:
        """Whether hooks, such as those of a checkpoint around the call, see the tensors that it saved."""
        return any(isinstance(part, Call) and part.hooks is not None for _, part in self.parts)

    def bytes_of_sample(self) -> int:
        """Return the bytes of all functions' results for one sample; 0 if none were counted."""
        return max((part.bytes for _, part in self.parts if isinstance(part, Call)), default=0)

    def close(self) -> None:
        """Keep only how samples ran, and undo what the call wrote if it has to leave the model as it was."""
        if self.restore is not None:
            self.restore()
        self.restore = None
        for _, part in self.parts:
            if isinstance(part, Alone):
                part.outputs.clear()


@dataclass
class Hints:
    """What calls on inputs of one structure have shown: it saves tries and comparisons, and may be lost at any time."""

    alone_reason: str = ""
    new_tensors: bool = False  # see `fastgrad.layers.call.Call`
    checkpoints: bool = False  # whether a checkpoint inside computes again in the backward pass
    compared: bool = False  # whether a batch was compared with an ordinary call
    #: By dimensions and sizes of one of what samples returned and wrote: where the batch is in each.
    places: dict[Any, dict[Any, Place]] = field(default_factory=dict)


# By the id of a model, because modules may define equality.
_known: dict[int, tuple[weakref.ref[nn.Module], dict[Any, Hints]]] = {}
_lock = threading.Lock()


def hints_of(model: nn.Module, key: Any) -> Hints:
    """Return the hints for a model and inputs of a structure."""
    with _lock:
        ref, found = _known.get(id(model), (None, {}))
        if ref is None or ref() is not model:
            # At the interpreter's end, the module's names may be gone before the model is.
            at, found, forget = id(model), {}, _known.pop
            _known[at] = weakref.ref(model, lambda _: forget(at, None)), found
        return found.setdefault(key, Hints())
