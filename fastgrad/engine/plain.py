"""What an ordinary call of the batch tells: shapes, from which follows where the batch is in what a model gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastgrad.engine import ordinary
from fastgrad.engine.inputs import CallInputs
from fastgrad.engine.outputs import Place, Stacked, find_place, likely_place, output_name
from fastgrad.engine.recorded import Hints
from fastgrad.engine.sharded import hooks_without_graph
from fastgrad.engine.together import Writes
from fastgrad.engine.turns import replacing
from fastgrad.engine.writes import Entry, Snapshot, entries, made_layers, remember_rows
from fastgrad.layers.call import NotPerSampleError

Modules = Sequence[tuple[str, nn.Module]]


class Plain:
    """An ordinary call on ``inputs``, from the state of ``snapshot``; it knows nothing until it is made."""

    def __init__(self, inputs: CallInputs, snapshot: Snapshot) -> None:
        self.inputs, self.snapshot = inputs, snapshot
        #: What it returned, by name, and the shapes of what it wrote; of two equal samples for one.
        self.outputs: dict[str, Any] | None = None
        self.writes: dict[Entry, Sequence[int]] = {}
        #: Whether it would have drawn random numbers.
        self.draws = False

    def call(self, forward: Callable[..., Any], modules: Modules, hints: Hints) -> None:
        """Call the model on the batch, on two equal samples for one, and undo what it writes."""
        leaves, one = self.inputs.copies(), self.inputs.samples == 1
        self.outputs = {}
        try:
            given = self.inputs.call_of(self.inputs.doubled(leaves) if one else leaves)
            # No other thread may take what is written here for the model's own.
            with replacing():
                try:
                    with hooks_without_graph(modules):
                        (values, _, names), quiet = ordinary.call(forward, given, self.snapshot)
                    changes = self.snapshot.changes()
                finally:
                    self.snapshot.restore()
            self.draws, hints.checkpoints = bool(quiet.names), hints.checkpoints or quiet.checkpoints
        except Exception:
            if not one:  # which a model may take alone
                raise
        else:
            self.outputs = dict(zip(names, values, strict=True))
            self.writes = {
                entry: t.shape for place, value in changes.items() for entry, t in entries(place, value, Tensor)
            }
            for entry, shape in self.writes.items():
                before = self.snapshot.earlier(entry)
                if isinstance(before, Tensor) and before.shape == shape and self.inputs.samples in shape and not one:
                    # A state of the batch, of which each sample gets its own.
                    remember_rows(self.snapshot.holder(entry[0]), *entry[1:], list(shape).index(self.inputs.samples))
            if made_layers(changes):
                raise NotPerSampleError(
                    "model must not create layers or parameters in forward; if only its first call does, call it before"
                )

    def places(
        self, names: Sequence[str], leaves: Sequence[Any], writes: Writes, hints: Hints
    ) -> dict[Any, Place] | None:
        """Return where the batch is, by the numbers of outputs and by entries of attributes; None if not known yet."""
        entered: list[tuple[Any, Any]] = [
            (entry, x) for place, value in writes.items() for entry, x in entries(place, value, Stacked)
        ]
        returned: list[tuple[Any, Any]] = [(at, x) for at, x in enumerate(leaves) if isinstance(x, Stacked)]
        pattern = (
            len(leaves),
            *((key, tuple(n if n == 1 else 0 for n in x.values.shape[1:])) for key, x in returned + entered),
        )
        if pattern not in hints.places:
            if self.outputs is None:
                return None
            found: dict[Any, Place] = {}
            for key, x in (*returned, *entered):
                shape = x.values.shape[1:]
                if isinstance(key, tuple):
                    what, batch = f"attribute {self.snapshot.name(key)!r}", self.writes.get(key)
                else:
                    what, batch = output_name(names[key]), getattr(self.outputs.get(names[key]), "shape", None)
                if batch is not None:
                    found[key] = find_place(shape, batch, max(2, self.inputs.samples), what)
                elif isinstance(key, tuple) or not self.outputs:
                    found[key] = likely_place(shape)
                else:
                    raise NotPerSampleError(
                        f"model must return for a sample what it returns for the batch; {what} is another"
                    )
            leading = {x.values.shape[1] for _, x in returned if x.values.dim() > 1}
            if found and all(place is None for place in found.values()) and leading & self.inputs.lists:
                raise NotPerSampleError(
                    "inputs must be tensors with a row for each sample; a list with one tensor for each sample was "
                    "given. Stack the tensors, or pad and stack them"
                )
            hints.places[pattern] = found
        return hints.places[pattern]
