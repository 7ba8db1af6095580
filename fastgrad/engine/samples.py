"""Run the samples of a batch: together under vmap, in groups by the values that the model reads, or one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import StopRecomputation, pytree, vmap
from fastgrad.batches import same_class
from fastgrad.engine import ordinary, sharded
from fastgrad.engine.again import context
from fastgrad.engine.inputs import CallInputs
from fastgrad.engine.mode import PerSample, Split
from fastgrad.engine.modules import replaced
from fastgrad.engine.outputs import Stacked, Tree, flatten, require_rows
from fastgrad.engine.recorded import Alone, Hints
from fastgrad.engine.turns import reading, replacing
from fastgrad.engine.writes import Attribute, Entry, Snapshot, States, mapped
from fastgrad.layers.call import CHECKPOINT, Call, NotPerSampleError, Refused, RuleError
from fastgrad.memory import lacks_memory


@dataclass
class Part:
    """Samples that ran together, or one that ran alone. Tensors of samples are `Stacked`."""

    index: Tensor | None  # which samples; None for all
    part: Call | Alone
    output: Tree
    #: If these are all samples: tensors of one sample that the model or a hook kept.
    kept: list[Tensor] = field(default_factory=list)
    #: If not: attributes that were changed, and tensors that were written to, by id, with their new values.
    attributes: dict[Attribute, Any] = field(default_factory=dict)
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Samples:
    """The samples of one call of ``forward``, the forward pass of ``model``, each of which begins from ``snapshot``.

    ``parameters`` are those whose gradients are wanted, by id. ``thaws`` has frozen ones followed also where a
    checkpoint inside computes again with what the model holds at that time. ``counts`` has bytes counted; ``part``
    says that there are other samples in the batch. ``is_sharded`` is of the model.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], inputs: CallInputs, parameters: Mapping[int, Tensor],
        snapshot: Snapshot, modules: Sequence[tuple[str, nn.Module]], *, thaws: bool, counts: bool, part: bool,
        is_sharded: bool,
    ) -> None:  # fmt: skip
        self.model, self.forward, self.inputs, self.parameters = model, forward, inputs, parameters
        self.snapshot, self.modules = snapshot, modules
        self._thaws, self._counts = thaws, counts
        self._sharded = is_sharded
        # A state of the batch is none of a part of it.
        self.rows = 1 if part else inputs.samples
        self.states = States(snapshot, self.rows)

    def begin_again(self) -> None:
        """Undo what samples wrote."""
        self.snapshot.restore()
        self.states = States(self.snapshot, self.rows)

    def run(self, hints: Hints) -> list[Part]:
        """Run all samples; a model that vmap refuses runs again in another way, which is noted in ``hints``."""
        found: list[Part] = []
        waiting: list[Tensor | None] = [None]
        while waiting:
            index = waiting.pop(0)
            alone, new_tensors = hints.alone_reason, hints.new_tensors
            if alone and self._sharded:
                raise sharded.refuse(alone)
            try:
                found += self._alone(hints, index) if alone else [self._together(new_tensors, index)]
            except Split as split:
                if self._sharded:
                    raise sharded.refuse("it reads a value that differs between samples") from None
                whole = torch.arange(self.inputs.samples, device="cpu") if index is None else index
                values = split.values.to(whole.device)
                waiting[:0] = [whole[(values == v).all(1)] for v in values.unique(dim=0)]
                self.begin_again()
            except (NotPerSampleError, StopRecomputation):
                raise
            except Exception as error:
                if lacks_memory(error):
                    raise
                if (alone and not isinstance(error, Refused)) or isinstance(error, RuleError):
                    raise self._failure(error) from error
                if self._sharded and hints.places:
                    raise  # the model's own error: such calls have run together before
                _other_way(hints, error, new_tensors)
                found, waiting = [], [None]
                self.begin_again()
        return found

    def _failure(self, error: Exception) -> Exception:
        """Return the error to raise if a rule or a sample alone fails: the model's own if the batch fails as well."""
        self.begin_again()
        with replacing():
            try:
                ordinary.call(self.forward, self.inputs.call_of(self.inputs.copies()), self.snapshot)
            except Exception as own:
                return own if isinstance(error, RuleError) else error
            finally:
                self.begin_again()
        if isinstance(error, RuleError):
            return error
        return NotPerSampleError(
            "model must run on each sample alone, as a batch of one; it runs on the batch, but one sample raised "
            f"{type(error).__name__}: {error}"
        )

    def _together(self, new_tensors: bool, index: Tensor | None) -> Part:
        leaves = self.inputs.rows(index)
        unique = self.inputs.carriers(leaves)
        samples = self.inputs.samples if index is None else len(index)
        call = Call(self.parameters, samples, new_tensors)
        # A checkpoint would compute again with the batch's states.
        inside = None if self.states.found else context(self.model, self.modules, self.inputs.objects, self._sharded)
        mode = PerSample(call, self.snapshot, self.states.doubtful, inside, counts=self._counts)
        made: list[Tree] = []

        def state(rows: Tensor) -> Any:
            own = call.wrapped(rows if index is None else rows.index_select(0, index.to(rows.device)))
            mode.know([own])
            return own

        def one(*tensors: Tensor) -> Tensor:
            call.begin()
            pairs = zip(unique.items(), tensors, strict=True)
            of_sample = {key: same_class(x.unsqueeze(dim), given) for (key, (given, dim)), x in pairs}
            mode.know(of_sample.values())
            args, kwargs = self.inputs.call_of([of_sample.get(id(x), x) for x in leaves])
            shards = sharded.hooks_below(self.modules, call, mode.know) if self._sharded else contextlib.nullcontext()
            with replaced(self.model, call), self.states.given(state), shards, mode:
                values, rebuilt, names = require_rows(flatten(self.forward(*args, **kwargs)))
            if torch.is_grad_enabled():
                mode.require_known(values)
            made.append(([Stacked(call.physical(v)) if call.is_batched(v) else v for v in values], rebuilt, names))
            return tensors[0].detach()

        tensors, dims = zip(*unique.values(), strict=True)
        try:
            with reading():
                vmap(one, in_dims=dims, randomness="different")(*tensors)
        except (TypeError, AttributeError, NameError) as error:
            if error is not call.rule_failure:
                raise
            raise RuleError(f"a layer rule raised {type(error).__name__}: {error}") from error
        kept = mode.kept()
        if index is None:
            return Part(None, call, made[0], kept)

        def stacked(entry: Entry, value: Any) -> Any:
            if any(map(call.is_batched, pytree.tree_leaves(value))) and not isinstance(value, Tensor):
                raise NotPerSampleError(
                    "model must not keep tensors deep inside an attribute where its samples take different paths; "
                    f"{self.snapshot.name(entry)!r} held some"
                )
            return Stacked(call.physical(value)) if call.is_batched(value) else value

        changes = {place: mapped(place, value, stacked) for place, value in self.snapshot.changes().items()}
        part = Part(index, call, made[0], [], changes, self.snapshot.written())
        self.begin_again()
        return part

    def _alone(self, hints: Hints, index: Tensor | None) -> Iterator[Part]:
        for i in range(self.inputs.samples) if index is None else index.tolist():
            own = torch.tensor([i], device="cpu")
            part = Alone(self.model, self.parameters if self._thaws or not hints.checkpoints else {})
            leaves = self.inputs.rows(own)
            given = [x for x, _ in self.inputs.carriers(leaves).values()]

            def state(rows: Tensor, i: int = i, given: list[Tensor] = given) -> Tensor:
                given.append(rows[i])
                return given[-1]

            with replacing():
                try:
                    with self._own_buffers() as copies, part.swapped(), self.states.given(state):
                        args, kwargs = self.inputs.call_of(leaves)
                        thawed = bool(part.thawed) and not self._thaws
                        with ordinary.Dependent(given, self.snapshot, thawed=thawed) as mode:
                            result = self.forward(*args, **kwargs)
                    changes, written = self.snapshot.changes(), self.snapshot.written()
                finally:
                    self.begin_again()
            values, rebuilt, names = require_rows(flatten(result))

            def stacked(value: Any, part: Alone = part, mode: Any = mode) -> Any:
                if isinstance(value, Tensor) and value.is_leaf and not mode.holds(value):
                    return part.original(value)
                # Functions that `Dependent` does not see, those of scripts among them, leave a graph.
                if isinstance(value, Tensor) and value.requires_grad:
                    # A view, so that the gradient of one output does not include paths through another.
                    depends, value = True, value.view_as(value)
                    part.outputs.append(value)
                else:
                    depends = mode.holds(value)
                return Stacked(value.unsqueeze(0)) if depends else value

            output = [stacked(value) for value in values]
            attributes = {
                place: mapped(place, value, lambda _, value: stacked(value) if mode.holds(value) else value)
                for place, value in changes.items()
            }
            written |= {id(original): (original, copy.detach()) for original, copy in copies if copy._version}
            for name, parameter in sharded.named_parameters(self.model).items():
                if id(parameter) in written:
                    raise NotPerSampleError(
                        "model must not write to its parameters in forward where its samples run one by one; it wrote "
                        f"to {name!r}. Write to them outside of forward"
                    )
            yield Part(own, part, (output, rebuilt, names), [], attributes, written)

    @contextlib.contextmanager
    def _own_buffers(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Replace buffers by copies inside, so that no graph holds the originals; yield both."""
        tables = [(module._buffers, dict(module._buffers)) for _, module in self.modules if module._buffers]
        own = {id(b): (b, b.detach().clone()) for _, held in tables for b in held.values() if b is not None}
        for table, held in tables:
            table.update({name: None if b is None else own[id(b)][1] for name, b in held.items()})
        try:
            yield list(own.values())
        finally:
            for table, held in tables:
                for name, original in held.items():
                    if original is not None and table.get(name) is own[id(original)][1]:
                        table[name] = original


def _other_way(hints: Hints, error: Exception, new_tensors: bool) -> None:
    """Note how to run a model that vmap refused."""
    text = str(error).partition("\n")[0]
    hints.checkpoints |= text == CHECKPOINT
    if hints.alone_reason:
        return
    if not new_tensors and "vmap" in text and "inplace" in text.replace("in-place", "inplace"):
        hints.new_tensors = True
    else:
        hooked = isinstance(error, Refused) and error.hooked
        hints.alone_reason = ("a hook may change its gradients: " if hooked and "hook" not in text else "") + (
            text or type(error).__name__
        )
