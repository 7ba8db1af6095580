"""Run a model on each sample of a batch, and return what an ordinary call of the batch returns.

The first run on inputs of a new structure is compared with an ordinary call. This shows which dimension of each output
is the batch, and that samples do not interact.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import next_number, saved_tensor_hooks, saving_plainly
from fastgrad.batches import choices, input_tensors
from fastgrad.engine import graph
from fastgrad.engine.layout import MIXED, SAME, Layout, Stacked, Tree, default_layout, find_layout, flatten
from fastgrad.engine.passes import Outcome, Pass
from fastgrad.engine.refusals import refuse_mixing
from fastgrad.engine.state import ABSENT, Place, State, copy_containers, evaluation_model
from fastgrad.engine.structure import Alone, Recorded, Structure, structures_of
from fastgrad.layers.call import Call, NotPerSampleError
from fastgrad.memory import keep_freed_memory

_UNSEEN = "a parameter reaches the outputs through a function that Python does not see, or a tensor of an earlier call"


def run(
    model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, parameters: Mapping[int, Tensor],
    owner: nn.Module | None = None, *, undo: bool = False, modules: Sequence[tuple[str, nn.Module]] | None = None,
) -> tuple[Any, Recorded]:  # fmt: skip
    """Call ``forward``, the forward pass of ``model``; return its output and the record of each sample's gradients.

    ``parameters`` are those whose gradients are wanted, by id. Attributes and buffers are left as by an ordinary call,
    or, with ``undo``, as they were. If ``model`` is a copy made for this call, ``owner`` is the original. ``modules``
    are the modules of ``model`` with their paths. Raises ValueError if samples interact.
    """
    keep_freed_memory()
    one = _Run(model, forward, args, kwargs, parameters, undo=undo, modules=modules)
    # Compiled parts run as they are written: their compiled form hides the functions from modes.
    compiles = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            return one.result(structures_of(model if owner is None else owner)) if one.samples else one.empty()
    except NotPerSampleError:
        refuse_mixing(model, training=True)  # which names the layer
        raise


def known_structure(
    owner: nn.Module, model: nn.Module, args: Any, kwargs: Any, modules: Sequence[tuple[str, nn.Module]]
) -> Structure | None:
    """Return what an earlier run of ``owner``, or of its copy ``model``, showed for such inputs, or None."""
    structures = structures_of(owner)
    one = Pass(model, model, args, kwargs, {}, undo=True, modules=modules)
    return structures.get(one.key()) if structures else None


class _Run(Pass):
    def result(self, structures: dict[Any, Structure]) -> tuple[Any, Recorded]:
        """Run the samples as an earlier run on such inputs did, or for the first time."""
        key = self.key()
        structure = structures.pop(key, None)
        if structure is not None:
            structures[key] = structure
            # In training mode, other arguments may have the model write to other buffers.
            written = None if self.training else structure.written
            state = State(self.modules, written, [*self.objects, *structure.holders])
            with self._restoring(state):
                outcomes = self.outcomes(structure, state)
                known = structure.knows(state, random=self.training)
                if known and all(len(out.output[0]) == len(structure.layouts) for out in outcomes):
                    return self.assemble(structure, state, outcomes)
            state.restore()
        if saved_tensor_hooks() is None:
            found = self.first()
            structures[key] = found[1].structure.with_writes_of(structure)
            return found
        # A checkpoint around the call compares the tensors that two runs save, so it must not see the first run.
        with saving_plainly():
            structures[key] = self.first(restores=True)[1].structure.with_writes_of(structure)
        return self.result(structures)

    @contextlib.contextmanager
    def _restoring(self, state: State) -> Any:
        """Restore the model if an exception ends a run that must leave no trace."""
        try:
            yield
        except BaseException:
            if self.undo:
                state.restore()
            raise

    def empty(self) -> tuple[Any, Recorded]:
        """Call the model on an empty batch."""
        recorded = Recorded(self.parameters, 0, [], Structure(), self._behind())
        args, kwargs = self.call_of(self.leaves)
        leaves, rebuilt, _ = flatten(self.forward(*args, **kwargs))
        whole = [graph.mark_returned(recorded, t) if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
        return rebuilt(whole), recorded

    def _behind(self) -> list[Any]:
        """Return the graph nodes that computed the inputs."""
        given = [x for x in self.leaves if isinstance(x, Tensor) and x.requires_grad]
        return [x.view_as(x).grad_fn if x.grad_fn is None else x.grad_fn for x in given]

    # The first run on inputs of a structure.

    def first(self, *, restores: bool = False) -> tuple[Any, Recorded]:
        """Run the samples and compare with an ordinary call; NotPerSampleError if samples interact.

        ``restores`` leaves the model as it was.
        """
        holders = State(self.modules, frozenset()).objects()
        state = State(self.modules, None, [*self.objects, *holders], tables=True)
        begin = next_number()
        plain, expected = self.ordinary()
        self.numbers = range(begin, next_number())
        drew, written = state.drew(), state.written()
        changes, ended = state.changes(), State(self.modules, written)
        after = {place: copy_containers(value) for place, value in changes.items() if value is not ABSENT}
        state.restore()
        if any(table in ("_parameters", "_modules") for _, table, _ in changes):
            raise NotPerSampleError(
                "model must not create layers or parameters in forward; if only its first call does, call it before"
            )
        moved = {key: (p, before, p.detach().clone()) for key, (p, before) in plain.written.items()}
        size = plain.bytes / max(1, sum(x.numel() for x in input_tensors(self.leaves)))
        failure: Exception | None = None
        each = list(choices(self.leaves, self.samples))
        for carriers in each:
            doubtful = len(each) > 1
            structure = Structure(carriers, draws=drew, checkpoints=plain.checkpoints)
            structure.bytes_of_element, structure.holders = size, holders if changes else []
            try:
                with self._restoring(state):
                    outcomes = self.outcomes(structure, state)
                    self._require_unmoved(moved)
                    # Samples may change what the batch leaves as it was: an attribute that holds the size of the batch.
                    structure.places = frozenset(changes) | state.changed
                    structure.written = state.written() | written
                    structure.draws = drew or state.drew()
                    agree = ended.agrees(state) and _same_plain(changes, state.changes())
                    structure.needs_ordinary_call = not agree
                    try:
                        self._compare(structure, state, outcomes, expected, after, plain.precision, doubtful)
                    except NotPerSampleError:
                        # Samples draw random numbers in another order, so only evaluation mode can be compared.
                        if not (drew and self.training and state.drew()):
                            raise
                        self._first_in_evaluation()
                        structure.layouts, structure.attributes = [], {}
                        self._compare(structure, state, outcomes, expected, after, None, doubtful)
                    output, recorded = self.assemble(structure, state, outcomes, first_run=True)
            except NotPerSampleError as error:
                failure = failure or error
                state.restore()
                continue
            recorded.structure.custom_backward |= graph.has_custom_function(_graphed(output))
            if restores:
                state.restore()
            return output, recorded
        assert failure is not None
        if drew and not self.training:
            raise NotPerSampleError(f"{failure}. It also draws random numbers in evaluation mode") from failure
        raise failure

    def _require_unmoved(self, written: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Restore the parameters and raise NotPerSampleError if the second run changed them again."""
        for key, (parameter, _, after) in written.items():
            if not torch.equal(parameter, after):
                with torch.no_grad():
                    for one, value, _ in written.values():
                        one.copy_(value)
                name = next(name for name, p in self.model.named_parameters() if id(p) == key)
                raise NotPerSampleError(
                    "model must not write to its parameters in forward, such as to a moving average; it wrote to "
                    f"{name!r}. Write to them outside of forward"
                )

    def _first_in_evaluation(self) -> None:
        """Raise NotPerSampleError if samples interact in evaluation mode."""
        model = evaluation_model(self.model)
        args, kwargs = self.call_of(self.copied_leaves())
        _Run(model, model.forward, args, kwargs, self.parameters, undo=True).first()

    def _compare(
        self, structure: Structure, state: State, outcomes: list[Outcome], expected: Tree, after: Mapping[Place, Any],
        precision: float | None, doubtful: bool,
    ) -> None:  # fmt: skip
        """Find the layouts of outputs and attributes; NotPerSampleError names the first output without one.

        ``precision`` is the rounding error of the coarsest dtype in the model; None compares shapes alone.
        """
        leaves, _, structure.names = expected
        if {len(out.output[0]) for out in outcomes} != {len(leaves)}:
            raise _interact("the number of its outputs")
        for at, leaf in enumerate(leaves):
            rows = _rows([out.output[0][at] for out in outcomes], outcomes)
            structure.layouts.append(find_layout(rows, leaf, precision) if rows is not None else None)
        # If several choices of inputs could carry the batch, an output that joins samples rules this choice out.
        mixed = [name for name, layout in zip(structure.names, structure.layouts, strict=True) if layout == MIXED]
        if mixed and (doubtful or all(layout in (None, MIXED) for layout in structure.layouts)):
            raise _interact(f"its output {mixed[0]}".rstrip())
        args, kwargs = self.call_of(self.leaves)
        counts = [(len(x),) for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple))]
        joins = all(layout is None or layout.kind in ("sum", "mean") for layout in structure.layouts)
        if joins and any(isinstance(leaf, Tensor) and tuple(leaf.shape[:1]) in counts for leaf in leaves):
            raise NotPerSampleError(
                "inputs must be tensors with a row for each sample; a list with one tensor for each sample was given. "
                "Stack the tensors, or pad and stack them"
            )
        for place in _places(outcomes):
            trees = [out.attributes[place] for out in outcomes if place in out.attributes]
            wanted = flatten(after[place])[0] if place in after else []
            found = structure.attributes[place] = []
            for at, leaf in enumerate(trees[0][0]):
                rows = _rows([tree[0][at] for tree in trees], outcomes) if len(trees) == len(outcomes) else None
                layout = None
                if rows is not None and len(wanted) == len(trees[0][0]) and isinstance(wanted[at], Tensor):
                    layout = find_layout(rows, wanted[at], precision)
                    if layout == MIXED and rows.requires_grad:
                        raise _interact(f"the attribute {state.name(place)!r}")
                    if layout == MIXED or (layout.kind in ("sum", "mean") and not rows.requires_grad):
                        layout, structure.needs_ordinary_call = None, True
                # A tensor computed from parameters alone is a cache, and its graph must not outlive the call.
                cache = layout == SAME and leaf.values.requires_grad
                found.append(None if cache else layout)

    # Every run.

    def _is_tracked(self, recorded: Recorded, output: Any) -> bool:
        """Whether the mode saw all functions through which outputs depend on parameters."""
        if any(isinstance(part, Alone) for _, part in recorded.parts):
            return True
        numbers = [pair for _, part in recorded.parts if isinstance(part, Call) for pair in part.numbers]
        return not graph.untracked(_graphed(output), numbers, recorded.inputs) & self.parameters.keys()

    def assemble(
        self, structure: Structure, state: State, outcomes: list[Outcome], *, first_run: bool = False
    ) -> tuple[Any, Recorded]:
        """Return the output of the batch, and write the attributes that the call changed."""
        parts = [(out.index, out.part) for out in outcomes]
        recorded = Recorded(self.parameters, self.samples, parts, structure, self._behind(), self.numbers)

        def whole(each: Sequence[Any], layout: Layout | None) -> Any:
            rows = _rows(each, outcomes)
            if rows is None or layout in (None, MIXED):
                return each[0].values[0] if isinstance(each[0], Stacked) else each[0]
            assert layout is not None
            result = layout.join(rows)
            return graph.mark_returned(recorded, result) if result.requires_grad else result

        leaves = [whole([out.output[0][at] for out in outcomes], each) for at, each in enumerate(structure.layouts)]
        if MIXED in structure.layouts and not self.undo:
            self._mix(structure, state, leaves)
        output = outcomes[0].output[1](leaves)
        if (first_run or state.holds_graphs) and not self._is_tracked(recorded, output):
            state.restore()
            alone = replace(structure, alone_reason=_UNSEEN)
            return self.assemble(alone, state, self.outcomes(alone, state))
        for kept in outcomes[0].kept if len(outcomes) == 1 else ():
            _replace_by_batch(kept, recorded)
        if self.undo:
            state.restore()
            recorded.restore = state.restore
            return output, recorded
        attributes: dict[Place, Any] = {}
        for place in _places(outcomes):
            trees = [out.attributes[place] for out in outcomes if place in out.attributes]
            first, rebuilt, _ = trees[0]
            layouts = structure.attributes.get(place)
            if layouts is None or len(layouts) != len(first):
                layouts = [default_layout(x.values.shape[1:]) if isinstance(x, Stacked) else None for x in first]
            alike = len(trees) == len(outcomes) and len({len(tree[0]) for tree in trees}) == 1
            if alike and all(layout or not isinstance(x, Stacked) for layout, x in zip(layouts, first, strict=True)):
                values = [whole([tree[0][at] for tree in trees], layout) for at, layout in enumerate(layouts)]
                attributes[place] = rebuilt(values)
            else:
                state.write(place, state.before(place))
        if structure.needs_ordinary_call or (structure.writes and outcomes[0].index is not None):
            # Each part of the batch wrote as if it were the whole batch, so an ordinary call writes instead.
            state.restore()
            self.ordinary()
        for place, value in attributes.items():
            state.write(place, value)
        return output, recorded

    def _mix(self, structure: Structure, state: State, leaves: list[Any]) -> None:
        """Put outputs that join samples into ``leaves``, from an ordinary call."""
        now = State(self.modules, structure.written, [*self.objects, *structure.holders])
        state.restore()
        values = self.ordinary()[1][0]
        now.restore()
        for at, layout in enumerate(structure.layouts):
            if layout == MIXED:
                graphed = leaves[at].requires_grad
                leaves[at] = graph.mixed(values[at], f"output {structure.names[at]}") if graphed else values[at]


def _interact(what: str) -> NotPerSampleError:
    return NotPerSampleError(
        "model must treat the samples of a batch independently, or there is no gradient per sample; for one sample "
        f"alone, {what} differs from that in the batch"
    )


def _same_plain(changes: Mapping[Place, Any], others: Mapping[Place, Any]) -> bool:
    """Whether the same attributes changed, and those that are no tensors or objects are equal."""
    pairs = [(value, others.get(place)) for place, value in changes.items()]
    return changes.keys() == others.keys() and all(a == b for a, b in pairs if isinstance(a, (bool, int, float, str)))


def _places(outcomes: Sequence[Outcome]) -> list[Place]:
    return list({place: None for out in outcomes for place in out.attributes})


def _rows(each: Sequence[Any], outcomes: Sequence[Outcome]) -> Tensor | None:
    """Return the tensors of all samples ``(B, *shape)`` in the order of the batch; None if one is not a tensor."""
    if not all(isinstance(x, Stacked) for x in each):
        return None
    if len(each) == 1:
        values: Tensor = each[0].values
        return values
    if len({(x.values.shape[1:], x.values.dtype) for x in each}) > 1:
        return None
    order = torch.cat([out.index for out in outcomes if out.index is not None]).argsort()
    every = torch.cat([x.values for x in each])
    return every.index_select(0, order.to(every.device))


def _graphed(output: Any) -> list[Tensor]:
    return [t for t in flatten(output)[0] if isinstance(t, Tensor) and t.grad_fn is not None]


def _replace_by_batch(kept: tuple[Tensor, Tensor], recorded: Recorded) -> None:
    """Turn a tensor of one sample that a hook kept into the tensor of the batch."""
    tensor, physical = kept
    if physical.dim() > 1 and physical.shape[1] == 1:
        whole = physical.flatten(0, 1)
        with contextlib.suppress(RuntimeError):  # something else refers to it
            torch.utils.swap_tensors(tensor, graph.mark_returned(recorded, whole) if whole.requires_grad else whole)
