"""Run a model on each sample of a batch, and put what the samples return and write together as the batch's.

Where the batch is in an output, shapes tell (`fastgrad.engine.outputs`). The first call on inputs of a structure is
compared with an ordinary one, which can only refuse it. What earlier calls have shown saves work and changes no result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import has_global_hooks, hooks_of, saved_tensor_hooks, saving_plainly
from fastgrad.engine import compare, graph, ordinary
from fastgrad.engine.inputs import BatchDims, CallInputs
from fastgrad.engine.modules import uncompiled
from fastgrad.engine.outputs import Place, Stacked, flatten, join
from fastgrad.engine.plain import Plain
from fastgrad.engine.recorded import Hints, Recorded, hints_of
from fastgrad.engine.refusals import refuse_mixing
from fastgrad.engine.samples import Part, Samples
from fastgrad.engine.sharded import is_sharded
from fastgrad.engine.together import Writes, as_batch, put_together, replace_by, rows_of_kept
from fastgrad.engine.turns import reading
from fastgrad.engine.writes import Snapshot, entries, remember_rows
from fastgrad.layers import MODULES
from fastgrad.layers.call import Call, NotPerSampleError
from fastgrad.memory import keep_freed_memory

#: Returns the forward pass of a model, or of a copy of it.
Forward = Callable[[nn.Module], Callable[..., Any]]
_UNSEEN = "a parameter reaches the outputs through a function that Python does not see, or a tensor of an earlier call"


def run(
    model: nn.Module, forward: Forward, args: Any, kwargs: Any, parameters: Mapping[int, Tensor],
    owner: nn.Module | None = None, *, undo: bool = False, modules: Sequence[tuple[str, nn.Module]] | None = None,
    batch_dims: BatchDims = None, compared: bool = False, counts: bool = False, part: bool = False,
) -> tuple[Any, Recorded]:  # fmt: skip
    """Call the ``forward`` pass of ``model``; return its output and the record of each sample's gradients.

    ``parameters`` are those whose gradients are wanted, by id. What the model writes holds the batch's rows, or, with
    ``undo``, nothing stays. If ``model`` is a copy made for this call, ``owner`` is the original. ``modules`` are the
    modules of ``model`` with their paths. ``compared`` leaves the comparison with an ordinary call out; otherwise
    ValueError if samples interact. ``counts`` has the bytes of results counted, and ``part`` says that these are not
    all samples of the user's batch.
    """
    keep_freed_memory()
    one = _Run(model, forward, args, kwargs, parameters, undo, modules, batch_dims)
    owner = model if owner is None else owner
    if not one.inputs.samples:
        return one.empty()
    with uncompiled(module for _, module in one.modules):
        try:
            if saved_tensor_hooks() is not None and not one.hints(owner).places:
                # A checkpoint around the call compares the tensors that two runs save, so it must not see tries.
                with saving_plainly():
                    _Run(model, forward, args, kwargs, parameters, True, modules, batch_dims).result(owner)[1].close()
            return one.result(owner, compared=compared, counts=counts, part=part)
        except NotPerSampleError:
            refuse_mixing(model, training=True)  # which names the layer
            raise


class _Run:
    def __init__(
        self, model: nn.Module, forward: Forward, args: Any, kwargs: Any, parameters: Mapping[int, Tensor], undo: bool,
        modules: Sequence[tuple[str, nn.Module]] | None, batch_dims: BatchDims,
    ) -> None:  # fmt: skip
        self.model, self.forward_of, self.forward = model, forward, forward(model)
        self.parameters, self.undo, self.batch_dims = parameters, undo, batch_dims
        self.inputs = CallInputs(model.forward if undo else self.forward, args, kwargs, batch_dims)
        self.modules = list(model.named_modules()) if modules is None else modules
        self.hooks, self.training = 0, False
        #: Whether several processes hold the model: all have to take the same steps, whatever their samples are.
        self.sharded = is_sharded(model)
        for _, module in self.modules:
            self.training |= module.training
            self.hooks += sum(map(len, hooks_of(module)))

    def empty(self) -> tuple[Any, Recorded]:
        """Call the model on an empty batch."""
        recorded = Recorded(self.parameters, 0, inputs=self.inputs.behind())
        args, kwargs = self.inputs.call_of(self.inputs.leaves)
        leaves, rebuilt, _ = flatten(self.forward(*args, **kwargs))
        # What the model reduces over samples is a row of each of none.
        leaves = [t.unsqueeze(0)[:0] if isinstance(t, Tensor) and 0 not in t.shape else t for t in leaves]
        whole = [graph.mark_returned(recorded, t) if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
        recorded.places, recorded.rows = [0] * len(leaves), [isinstance(t, Tensor) for t in leaves]
        return rebuilt(whole), recorded

    def hints(self, owner: nn.Module) -> Hints:
        """Return what is known of such calls."""
        one = self.inputs.samples == 1 and not self.sharded
        key = self.inputs.key(), one, self.training, self.hooks, len(MODULES)
        return hints_of(owner, key)

    def result(
        self, owner: nn.Module, *, compared: bool = False, counts: bool = False, part: bool = False
    ) -> tuple[Any, Recorded]:
        """Run the samples, and again in another way or beside an ordinary call where that is needed."""
        samples, shared = self.inputs.samples, self.hints(owner)
        # A copy, because other threads must not change what this call knows of how its samples ran.
        hints = replace(shared, places=dict(shared.places))
        with reading():
            self.snapshot = Snapshot(self.modules, self.inputs.objects, self.inputs.leaves, sharded=self.sharded)
        self.plain = Plain(self.inputs, self.snapshot)
        hooked = self._hooks_gradients()
        if hooked:
            hints.alone_reason = "a hook may change its gradients (full backward hook)"
        if not hints.places or not (compared or hints.compared or samples == 1):
            self.plain.call(self.forward, self.modules, hints)
        ways = Samples(
            self.model, self.forward, self.inputs, self.parameters, self.snapshot, self.modules, thaws=self.undo,
            counts=counts, part=part, is_sharded=self.sharded,
        )  # fmt: skip
        try:
            carried = False
            while True:
                parts = ways.run(hints)
                names = parts[0].output[2]
                leaves, writes, kept = put_together(parts, self.snapshot)
                places = self.plain.places(names, leaves, writes, hints)
                if places is None:
                    ways.begin_again()
                    self.plain.call(self.forward, self.modules, hints)
                elif self.carries(writes, places, ways) and not carried:
                    carried = True
                    ways.begin_again()
                else:
                    recorded = Recorded(self.parameters, samples, [(p.index, p.part) for p in parts])
                    recorded.lines = self.inputs.lines
                    recorded.alone_reason = hints.alone_reason
                    output, written = as_batch(parts, leaves, writes, places, recorded)
                    loose = rows_of_kept(kept, written, recorded)
                    behind = self.behind(parts, recorded, output, written, ways.states.nodes())
                    if hints.alone_reason or not behind.untracked & self.parameters.keys():
                        break
                    hints.alone_reason = _UNSEEN
                    ways.begin_again()
            if graph.reentrant_checkpoint(behind.kinds):
                raise NotPerSampleError(
                    "model must not hold a checkpoint with use_reentrant=True, whose backward pass gives no gradients "
                    "of single samples; use use_reentrant=False"
                )
            if not (compared or hints.compared):
                self.compare(names, flatten(output)[0])
        except BaseException:
            ways.begin_again()
            raise
        hints.compared |= samples > 1 or self.sharded
        vars(shared).update(vars(hints))
        recorded.inputs = behind.entries
        recorded.custom_backward = hooked or "hook" in hints.alone_reason or graph.custom_function(behind.kinds)
        recorded.batched_backward = not (
            self.sharded or any(isinstance(p.part, Call) and p.part.checkpoints for p in parts)
        ) and graph.batched_backward(behind.kinds)
        for tensor, rows in loose:
            replace_by(tensor, rows)
        if self.undo:
            # After the backward pass, because the graph may hold what was written.
            recorded.restore = self._restoring_buffers() if hints.checkpoints else self.snapshot.restore
        else:
            self.write(parts, written)
        return output, recorded

    def _hooks_gradients(self) -> bool:
        """Whether a module that runs inside the call has hooks of gradients."""
        modules = [m for _, m in self.modules if m is not self.model or self.undo] if self.hooks else []
        return has_global_hooks(backward=True) or any(m._backward_hooks or m._backward_pre_hooks for m in modules)

    def _restoring_buffers(self) -> Callable[[], None]:
        """Return what restores buffers, to which a checkpoint that computes again in the backward pass may write."""
        kept = [
            (b, b.detach().clone()) for _, module in self.modules for b in module._buffers.values() if b is not None
        ]

        def restore() -> None:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
            self.snapshot.restore()

        return restore

    def compare(self, names: Sequence[str], outputs: Sequence[Any]) -> None:
        """Raise NotPerSampleError if an output differs from the ordinary call's, and does so in float64 as well."""
        plain = self.plain.outputs
        if self.inputs.samples == 1 or not plain:
            return
        if plain.keys() != set(names):
            raise compare.interact("structure")
        # FSDP may run a model in another dtype than that of its outputs.
        precision = max(
            (torch.finfo(p.dtype).eps for p in self.parameters.values() if self.sharded and p.is_floating_point()),
            default=0.0,
        )
        found = compare.differing(zip(names, outputs, strict=True), plain, precision)
        if not found:
            return
        # A tenth of an output is no rounding, unless it was computed in half precision.
        cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if (
            cast
            or self.training
            or self.plain.draws
            or not compare.differing(zip(names, outputs, strict=True), plain, 1e-2)
        ):
            drawn = compare.drawn()
            found = self._found_in_double(found, self.training)
            if found and self.training and drawn != compare.drawn():  # by a generator of Python or NumPy
                found = self._found_in_double(found, False)
        if found:
            raise compare.interact(found[0])

    def _found_in_double(self, found: list[str], training: bool) -> list[str]:
        """Return the outputs that differ in float64 and without random numbers, or those ``found`` if this cannot run.

        This tells rounding from samples that interact.
        """
        twin = compare.twin(self.model)
        if twin is None:
            return found
        for module in twin.modules():
            module.training = module.training and training
        call = self.inputs.call_of(compare.widened(self.inputs.leaves))
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError), ordinary.Quiet():
            mine, once = run(twin, self.forward_of, *call, {}, undo=True, batch_dims=self.batch_dims, compared=True)
            once.close()
            call = self.inputs.call_of(compare.widened(self.inputs.leaves))
            batch, _, again = flatten(self.forward_of(twin)(*call[0], **call[1]))
            own, _, names = flatten(mine)
            return compare.differing(zip(names, own, strict=True), dict(zip(again, batch, strict=True)))
        return found

    def carries(self, writes: Writes, places: Mapping[Any, Place], ways: Samples) -> bool:
        """Note the rows that are written, and return whether one replaces a state that samples did not get by rows."""
        again = False
        for place, value in writes.items():
            for entry, x in entries(place, value, Stacked):
                holder, before = self.snapshot.holder(entry[0]), self.snapshot.earlier(entry)
                known = remember_rows(holder, *entry[1:], places[entry])
                state = isinstance(before, Tensor) and before.shape == join(x.values, places[entry]).shape
                again |= known and state and ways.rows > 1 and not ways.states.holds(holder, *entry[1:])
        return again

    def behind(
        self, parts: list[Part], recorded: Recorded, output: Any, written: Writes, states: list[Any]
    ) -> graph.Walk:
        """Walk the graph behind outputs and attributes."""
        held = [t for place, value in written.items() for _, t in entries(place, value, Tensor)]
        graphed = [t for t in (*flatten(output)[0], *held) if isinstance(t, Tensor) and t.grad_fn is not None]
        numbers = [pair for p in parts if isinstance(p.part, Call) for pair in p.part.numbers]
        return graph.walk(graphed, numbers, self.inputs.behind() + states, recorded)

    def write(self, parts: list[Part], written: Writes) -> None:
        """Write what the samples wrote."""
        for place, value in written.items():
            self.snapshot.write(place, value)
        with torch.no_grad():
            for tensor, value in parts[0].written.values():
                tensor.copy_(value)
