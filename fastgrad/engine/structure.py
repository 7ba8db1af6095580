"""What the engine remembers: of a model for inputs of one structure, and of one run until its graph is gone."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastgrad.engine.layout import Layout
from fastgrad.engine.state import Buffer, Place, State
from fastgrad.layers.call import Call


@dataclass(eq=False)
class Structure:
    """What the first run on inputs of one structure has shown."""

    carriers: tuple[bool, ...] = ()  # which inputs carry the batch
    layouts: list[Layout | None] = field(default_factory=list)  # of each output; None for values that are not tensors
    names: list[str] = field(default_factory=list)  # of each output
    attributes: dict[Place, list[Layout | None]] = field(default_factory=dict)
    written: frozenset[Buffer] = frozenset()  # buffers and other tensors of modules that a call writes to
    holders: list[Any] = field(default_factory=list)  # objects of modules whose attributes a call may write
    places: frozenset[Place] = frozenset()  # attributes that a call changes
    draws: bool = False  # whether a call draws random numbers
    needs_ordinary_call: bool = False  # whether only an ordinary call writes them correctly
    checkpoints: bool = False  # whether a checkpoint inside computes again in the backward pass
    batch_new_tensors: bool = False  # see `fastgrad.layers.call.Call`
    alone_reason: str = ""  # why samples run one by one; empty if they do not
    bytes_of_element: float = 0.0  # bytes of all functions' results per number in the inputs
    #: Whether gradients may not be proportional to those of the outputs, because of custom functions or hooks.
    custom_backward: bool = False
    batched_backward: bool = False  # whether several gradients can go back in one pass

    @property
    def writes(self) -> bool:
        """Whether a call changes attributes, buffers or random numbers."""
        return bool(self.written or self.places or self.draws)

    def knows(self, state: State, *, random: bool) -> bool:
        """Whether earlier calls changed all that changed since ``state``; with ``random``, numbers drawn count, too."""
        same = state.changed <= self.places and state.written() <= self.written
        return same and (self.draws or not (random and state.drew()))

    def with_writes_of(self, earlier: Structure | None) -> Structure:
        """Add what calls wrote on other paths through the model, which inputs or attributes choose."""
        if earlier is not None:
            self.attributes = earlier.attributes | self.attributes
            self.written |= earlier.written
            self.places |= earlier.places
            self.draws |= earlier.draws
            self.holders = self.holders or earlier.holders
            self.needs_ordinary_call |= earlier.needs_ordinary_call
        return self


class Alone:
    """One sample that ran without vmap; autograd gives its gradients from its own ``outputs``.

    ``thawed`` are copies of frozen parameters that require gradients, by the ids of the originals.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[int, Tensor]) -> None:
        frozen = {key: p for key, p in parameters.items() if not p.requires_grad}
        self.thawed = {key: p.detach().clone().requires_grad_() for key, p in frozen.items()}
        self.outputs: list[Tensor] = []
        self._model = model

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
    parts: list[tuple[Tensor | None, Call | Alone]]
    structure: Structure
    #: Nodes of the graph behind the call's inputs.
    inputs: list[Any] = field(default_factory=list)
    #: Sequence numbers of the operations of the ordinary call that a first run made.
    ordinary_numbers: range = range(0)
    #: Restores what the call wrote, if it has to leave the model as it was.
    restore: Callable[[], None] | None = None

    @property
    def hooked(self) -> bool:
        """Whether hooks, such as those of a checkpoint around the call, see the tensors that it saved."""
        return any(isinstance(part, Call) and part.hooks is not None for _, part in self.parts)

    def close(self) -> None:
        """Keep only how samples ran."""
        if self.restore is not None and any(isinstance(part, Alone) for _, part in self.parts):
            self.restore()  # a checkpoint has computed samples again
        self.restore = None
        for _, part in self.parts:
            if isinstance(part, Alone):
                part.outputs.clear()


# By the id of a model, because modules may define equality.
_known: dict[int, tuple[weakref.ref[nn.Module], dict[Any, Structure]]] = {}
_lock = threading.Lock()


def structures_of(model: nn.Module) -> dict[Any, Structure]:
    """Return what is known of a model, by the structure of inputs, the latest last."""
    with _lock:
        ref, found = _known.get(id(model), (None, {}))
        if ref is None or ref() is not model:
            # At the interpreter's end, the module's names may be gone before the model is.
            key, found, forget = id(model), {}, _known.pop
            _known[key] = weakref.ref(model, lambda _: forget(key, None)), found
        return found
