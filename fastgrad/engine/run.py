"""Run a model on each sample of a batch: all together under vmap, in groups by the values that it reads, or alone.

The first run on inputs of a structure is compared with an ordinary call of the batch. It shows where the batch lies in
the outputs, and that samples do not interact.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad._torch import (
    StopRecomputation,
    has_global_hooks,
    hooks_of,
    pytree,
    saved_tensor_hooks,
    saving_plainly,
    vmap,
)
from fastgrad.batches import batch_size, choices, input_tensors, same_class
from fastgrad.engine import graph
from fastgrad.engine.memory import keep_freed_memory, lacks_memory
from fastgrad.engine.layout import Layout, Rows, find, flatten, is_object, usual
from fastgrad.engine.mode import PerSample, Split
from fastgrad.engine.modules import replaced
from fastgrad.engine.state import ABSENT, Buffer, Place, State, copied, evaluated
from fastgrad.layers.call import Call, NotPerSampleError, Refused

Forward = Callable[..., Any]
Tree = tuple[list[Any], Callable[[Sequence[Any]], Any], list[str]]


class Alone:
    """One sample that ran as it is: its gradients are those of its own ``outputs``.

    Frozen parameters were ``thawed`` for it, by their ids.
    """

    def __init__(self, model: nn.Module, thawed: Mapping[int, Tensor]) -> None:
        self.outputs: list[Tensor] = []
        self.thawed, self._model = thawed, model

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the model use these copies of frozen parameters, which require gradients."""
        places = [(m, name, p) for m in self._model.modules() for name, p in m._parameters.items() if id(p) in self.thawed]
        try:
            for module, name, p in places:
                module._parameters[name] = self.thawed[id(p)]  # type: ignore[assignment]
            yield
        finally:
            for module, name, p in places:
                module._parameters[name] = p


@dataclass(eq=False)
class Recorded:
    """A run of a model on a batch; it lives as long as the graph of its outputs."""

    parameters: Mapping[int, Tensor]
    samples: int
    #: Which samples, None for all in order, and how they ran.
    parts: list[tuple[Tensor | None, Call | Alone]]
    structure: Structure
    #: Nodes of the graph behind the call's inputs.
    inputs: list[Any] = field(default_factory=list)

    @property
    def hooked(self) -> bool:
        """Whether tensors that the call saved go through hooks."""
        return any(isinstance(part, Call) and part.hooks is not None for _, part in self.parts)

    def forget_graphs(self) -> None:
        """Keep only how samples ran."""
        for _, part in self.parts:
            if isinstance(part, Alone):
                part.outputs.clear()


@dataclass(eq=False)
class Structure:
    """What is known of a model for inputs of one structure."""

    carriers: tuple[bool, ...]  # which inputs have a row for each sample
    layouts: list[Layout | None] = field(default_factory=list)  # of each output; None for what is no tensor
    names: list[str] = field(default_factory=list)  # of each output
    attributes: dict[Place, list[Layout | None]] = field(default_factory=dict)
    written: frozenset[Buffer] = frozenset()  # buffers that a call writes to
    writes: bool = False  # whether a call changes attributes, buffers or random numbers
    ordinary: bool = False  # whether only an ordinary call changes them as it should
    spread_made: bool = False  # see `Call`
    alone: str = ""  # why samples run alone
    bytes_of_element: float = 0.0  # of what functions gave for each number of the inputs
    #: Whether gradients may not be in proportion to those of the outputs: functions of autograd, or hooks.
    foreign: bool = False
    batches: bool = False  # whether several gradients are known to go back together


@dataclass
class _Outcome:
    """What one part of a batch gave: outputs and changed attributes, as `Rows` of its samples or other values."""

    index: Tensor | None
    part: Call | Alone
    output: Tree
    attributes: dict[Place, Tree]
    #: Tensors of one sample that someone, such as a hook, kept.
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Known:
    """Structures by model and key; ids, because modules may define equality."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[nn.Module], dict[Any, Structure]]] = {}
        self._lock = threading.Lock()

    def of(self, model: nn.Module) -> dict[Any, Structure]:
        with self._lock:
            ref, found = self._held.get(id(model), (None, {}))
            if ref is None or ref() is not model:
                key = id(model)
                self._held[key] = weakref.ref(model, lambda _: self._held.pop(key, None)), found
            return found


_known = _Known()
_UNSEEN = "a parameter reaches the outputs by a function that Python does not see, or by a tensor of an earlier call"


class _Plain(TorchFunctionMode):
    """Looks at results, and keeps PyTorch's attention from its fused paths, as `PerSample` does."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.precision = 0, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes += out.numel() * out.element_size()
            if out.is_floating_point():
                self.precision = max(self.precision, torch.finfo(out.dtype).eps)
        return out


def run(
    model: nn.Module,
    forward: Forward,
    args: Any,
    kwargs: Any,
    parameters: Mapping[int, Tensor],
    owner: nn.Module | None = None,
    undo: bool = False,
) -> tuple[Any, Recorded]:
    """Call ``forward``, that of ``model``, and return its output and what is known of each sample's gradients.

    ``parameters`` are those whose gradients count, by id. What the model writes is as after an ordinary call, or with
    ``undo`` as before. ``owner`` is the model of which this is a copy for one call. ValueError if samples interact.
    """
    keep_freed_memory()
    # Compiled parts run as they are written: their compiled form hides the functions from modes.
    compiles = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
        return _Run(model, forward, args, kwargs, parameters, owner, undo).result()


def known(model: nn.Module) -> dict[Any, Structure]:
    """Return what is known of a model, by structures of inputs, the latest last."""
    return _known.of(model)


def known_structure(model: nn.Module, args: Any, kwargs: Any) -> Structure | None:
    """Return what is known of a model for inputs like these, if it ran on such."""
    one = _Run(model, model, args, kwargs, {})
    return _known.of(model).get(one.key())


class _Run:
    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        args: Any,
        kwargs: Any,
        parameters: Mapping[int, Tensor],
        owner: nn.Module | None = None,
        undo: bool = False,
    ) -> None:
        self.model, self.forward, self.parameters, self.undo = model, forward, parameters, undo
        self.owner = model if owner is None else owner
        self.samples = batch_size(args, kwargs)
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.objects = [x for x in self.leaves if is_object(x)]
        modules = list(model.modules())
        self.training = any(module.training for module in modules)
        self.hooks = sum(len(table) for module in modules for table in hooks_of(module))

    def key(self) -> Any:
        inputs = tuple(
            (x.dim(), x.dtype, bool(x.dim()) and x.shape[0] == self.samples, x.requires_grad)
            if isinstance(x, Tensor)
            else type(x)
            for x in self.leaves
        )
        return inputs, self.spec, self.samples == 1, self.training, self.hooks

    def result(self) -> tuple[Any, Recorded]:
        if self.samples == 0:
            return self.empty()
        known, key = _known.of(self.owner), self.key()
        structure = known.pop(key, None)
        if structure is not None:
            known[key] = structure
            state = State(self.model, structure.written, self.objects)
            try:
                outcomes = self.outcomes(structure, state)
            except BaseException:
                if self.undo:
                    state.restore()
                raise
            if all(len(out.output[0]) == len(structure.layouts) for out in outcomes):
                return self.joined(structure, state, outcomes)
            state.restore()
        if saved_tensor_hooks() is None:
            found = self.checked()
            known[key] = found[1].structure
            return found
        # A checkpoint around the call compares what two runs save: the first run is not the one that it sees.
        with saving_plainly():
            known[key] = self.checked()[1].structure
        return self.result()

    def empty(self) -> tuple[Any, Recorded]:
        """Call the model on no samples, as it is."""
        recorded = Recorded(self.parameters, 0, [], Structure(()), self._behind())
        args, kwargs = self._call_of(self.leaves)
        leaves, rebuilt, _ = flatten(self.forward(*args, **kwargs))
        graphed = [isinstance(t, Tensor) and t.requires_grad for t in leaves]
        whole = [graph.returned(recorded, t) if known else t for t, known in zip(leaves, graphed, strict=True)]
        return rebuilt(whole), recorded

    def _behind(self) -> list[Any]:
        """Return the nodes of the graph that inputs come from."""
        given = [x for x in self.leaves if isinstance(x, Tensor) and x.requires_grad]
        return [x.view_as(x).grad_fn if x.grad_fn is None else x.grad_fn for x in given]

    def ordinary(self) -> tuple[_Plain, Tree]:
        """Call the model on the whole batch; its outputs have no graph."""
        # As in the call itself, gradients are enabled: hooks of tensors cannot be registered without.
        leaves = [_own(x) for x in self.leaves]
        args, kwargs = self._call_of(leaves)
        with warnings.catch_warnings(), _Plain() as plain:
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            values, rebuilt, names = flatten(self.forward(*args, **kwargs))
        # Autocast keeps casts of parameters, and these belong to another graph.
        torch.clear_autocast_cache()
        return plain, ([v.detach() if isinstance(v, Tensor) else v for v in values], rebuilt, names)

    # The first run on inputs of a structure.

    def checked(self) -> tuple[Any, Recorded]:
        state = State(self.model, None, self.objects)
        plain, expected = self.ordinary()
        drew, written = state.drew(), state.written()
        after = {place: copied(value) for place, value in state.changes().items() if value is not ABSENT}
        state.restore()
        failure: Exception | None = None
        for carriers in choices(self.leaves, self.samples):
            structure = Structure(carriers, written=written, writes=bool(written or after or drew))
            structure.bytes_of_element = plain.bytes / max(1, sum(x.numel() for x in input_tensors(self.leaves)))
            try:
                outcomes = self.outcomes(structure, state)
                try:
                    self._compare(structure, state, outcomes, expected, after, drew, plain.precision)
                except NotPerSampleError:
                    # Samples that draw numbers in another order cannot be compared, except in evaluation mode.
                    if not (drew and self.training and state.drew()):
                        raise
                    self._require_apart_in_evaluation()
                    structure.layouts, structure.attributes = [], {}
                    self._compare(structure, state, outcomes, expected, after, drew, None)
                output, recorded = self.joined(structure, state, outcomes)
                if not state.holds_graphs and not self._is_tracked(recorded, output):
                    structure.alone = _UNSEEN
                    state.restore()
                    output, recorded = self.joined(structure, state, self.outcomes(structure, state))
                structure.foreign |= graph.foreign(_graphed(output))
                return output, recorded
            except NotPerSampleError as error:
                failure = failure or error
                state.restore()
        assert failure is not None
        raise failure

    def _require_apart_in_evaluation(self) -> None:
        """Raise NotPerSampleError if samples interact in evaluation mode."""
        model = evaluated(self.model)
        forward = model if self.forward is self.model else functools.partial(type(model).forward, model)
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in self.leaves]
        with State(model).own_buffers():
            _Run(model, forward, *self._call_of(leaves), self.parameters).checked()

    def _compare(
        self,
        structure: Structure,
        state: State,
        outcomes: list[_Outcome],
        expected: Tree,
        after: Mapping[Place, Any],
        drew: bool,
        precision: float | None,
    ) -> None:
        """Find the layouts of outputs and attributes; NotPerSampleError names the first output that has none.

        ``precision`` is that of the coarsest numbers in the model; None compares shapes alone.
        """
        leaves, _, names = expected
        counts = {len(out.output[0]) for out in outcomes}
        if counts != {len(leaves)}:
            raise self._interacts("its number of outputs", drew)
        for at, (leaf, name) in enumerate(zip(leaves, names, strict=True)):
            rows = _rows([out.output[0][at] for out in outcomes], outcomes)
            if rows is None or not isinstance(leaf, Tensor):
                structure.layouts.append(None)
                continue
            layout = find(rows, leaf, precision)
            if layout is None:
                raise self._interacts(f"output {name}" if name else "its output", drew)
            structure.layouts.append(layout)
        structure.names = names
        if not any(layout is not None and layout.kind != "mixed" for layout in structure.layouts):
            raise self._interacts("its output", drew)
        for place in {place: None for out in outcomes for place in out.attributes}:
            each = [out.attributes[place][0] for out in outcomes if place in out.attributes]
            found: list[Layout | None] = []
            wanted = flatten(after[place])[0] if place in after else []
            for at, leaf in enumerate(each[0]):
                rows = _rows([leaves[at] for leaves in each], outcomes) if len(each) == len(outcomes) else None
                other = wanted[at] if len(wanted) == len(each[0]) else None
                layout = None
                if rows is not None and isinstance(other, Tensor):
                    layout = find(rows, other, precision)
                    layout = None if layout == Layout("mixed") else layout
                    if layout is None and rows.requires_grad:
                        raise self._interacts(f"attribute {state.name(place)!r}", drew)
                    structure.ordinary |= layout is None
                if layout == Layout("same") and isinstance(leaf, Rows) and leaf.values.requires_grad:
                    layout = None  # a cache of what was computed from parameters
                found.append(layout if isinstance(leaf, Rows) else None)
            structure.attributes[place] = found

    def _interacts(self, what: str, drew: bool) -> NotPerSampleError:
        why = "draws random numbers in evaluation mode, or samples interact" if drew else "samples interact"
        return NotPerSampleError(
            f"model must treat the samples of a batch independently, or there is no gradient per sample; {what} is "
            f"not that of each sample alone, so it {why}" if drew else
            f"model must treat the samples of a batch independently, or there is no gradient per sample; {what} is "
            f"not that of each sample alone, so {why}"
        )  # fmt: skip

    def _is_tracked(self, recorded: Recorded, output: Any) -> bool:
        """Whether modes saw all functions by which outputs depend on parameters.

        Scripted functions, extensions and tensors that were kept from an earlier call are not seen.
        """
        if any(isinstance(part, Alone) for _, part in recorded.parts):
            return True
        numbers = [pair for _, part in recorded.parts if isinstance(part, Call) for pair in part.numbers]
        missed = graph.untracked(_graphed(output), numbers, recorded.inputs) & self.parameters.keys()
        return not missed

    # Every run.

    def _call_of(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def outcomes(self, structure: Structure, state: State) -> list[_Outcome]:
        """Run all samples: together, in groups, or alone."""
        found: list[_Outcome] = []
        waiting: list[Tensor | None] = [None]
        if not structure.alone and self.differentiated():
            structure.alone, structure.foreign = "a hook may change its gradients (full backward hook)", True
        while waiting:
            index = waiting.pop(0)
            leaves = self._taken(structure, index)
            with state.own_buffers() if self.undo or found or index is not None else contextlib.nullcontext():
                try:
                    if structure.alone:
                        found += self._alone(structure, state, leaves, index)
                    else:
                        found.append(self._together(structure, state, leaves, index))
                    again = False
                except Split as split:
                    whole = torch.arange(self.samples) if index is None else index
                    groups = split.values.unique(dim=0)
                    waiting = [whole[(split.values == v).all(1).to(whole.device)] for v in groups] + waiting
                    again = True
                except (NotPerSampleError, StopRecomputation):
                    raise
                except Exception as error:
                    if lacks_memory(error):
                        raise
                    if structure.alone:
                        raise self._of_samples(error, state) from error
                    structure.foreign |= isinstance(error, Refused) and error.hooked
                    text = str(error).partition("\n")[0]
                    if not structure.spread_made and "vmap" in text and "inplace" in text.replace("in-place", "inplace"):
                        structure.spread_made = True
                    else:
                        structure.alone = text or type(error).__name__
                    waiting, found, again = [None], [], True
            if again or waiting:
                state.restore()
        return found

    def _of_samples(self, error: Exception, state: State) -> Exception:
        """Return the error to raise where a sample alone fails: the model's own, if the batch fails as well."""
        state.restore()
        try:
            self.ordinary()
        except Exception:
            return error
        state.restore()
        return NotPerSampleError(
            "model must run on each sample alone, as a batch of one; it runs on the batch, but on one sample it raised "
            f"{type(error).__name__}: {error}"
        )

    def differentiated(self) -> bool:
        """Whether modules have hooks of gradients, which see those of the batch."""
        modules = [m for m in self.model.modules() if m is not self.model or self.forward is self.model]
        return has_global_hooks(backward=True) or any(m._backward_hooks or m._backward_pre_hooks for m in modules)

    def _taken(self, structure: Structure, index: Tensor | None) -> list[Any]:
        if index is None:
            return self.leaves
        taken: dict[int, Tensor] = {}
        for x, carries in zip(self.leaves, structure.carriers, strict=True):
            if carries and id(x) not in taken:
                taken[id(x)] = x.index_select(0, index.to(x.device))
        return [taken.get(id(x), x) if c else x for x, c in zip(self.leaves, structure.carriers, strict=True)]

    def _together(self, structure: Structure, state: State, leaves: list[Any], index: Tensor | None) -> _Outcome:
        carried = [i for i, carries in enumerate(structure.carriers) if carries]
        unique = {id(leaves[i]): leaves[i] for i in carried}
        count = self.samples if index is None else len(index)
        call = Call(self.parameters, count, index, self.samples, structure.spread_made)
        made: list[_Outcome] = []
        seen: list[weakref.ref[Tensor]] | None = [] if self.hooks or has_global_hooks() else None

        def rows(tree: Any) -> Tree:
            values, rebuilt, names = flatten(tree)
            return [Rows(call.spread(v, call.physical(v))) if isinstance(v, Tensor) else v for v in values], rebuilt, names

        def one(*tensors: Tensor) -> Tensor:
            call.begin()
            of_sample = dict(zip(unique, (x.unsqueeze(0) for x in tensors), strict=True))
            own = list(leaves)
            for i in carried:
                own[i] = same_class(of_sample[id(leaves[i])], leaves[i])
            args, kwargs = self._call_of(own)
            with replaced(self.model, call), PerSample(call, seen):
                output = self.forward(*args, **kwargs)
            changes = {place: value for place, value in state.changes().items() if _holds_tensors(value)}
            made.append(_Outcome(index, call, rows(output), {place: rows(value) for place, value in changes.items()}))
            return tensors[0].detach()

        vmap(one, randomness="different")(*unique.values())
        alive = [t for ref in seen or () if (t := ref()) is not None]
        made[0].kept = [(t, call.physical(t)) for t in {id(t): t for t in alive}.values()]
        return made[0]

    def _alone(self, structure: Structure, state: State, leaves: list[Any], index: Tensor | None) -> Iterator[_Outcome]:
        count = self.samples if index is None else len(index)
        for i in range(count):
            if i:
                state.restore(numbers=False)
            own = [x[i : i + 1] if c else x for x, c in zip(leaves, structure.carriers, strict=True)]
            with state.own_buffers():
                yield self._sample(state, own, torch.tensor([i]) if index is None else index[i : i + 1])

    def _sample(self, state: State, leaves: list[Any], index: Tensor) -> _Outcome:
        frozen = {key: p for key, p in self.parameters.items() if not p.requires_grad}
        part = Alone(self.model, {key: p.detach().clone().requires_grad_() for key, p in frozen.items()})

        def rows(tree: Any) -> Tree:
            values, rebuilt, names = flatten(tree)
            # Views of their own: outputs that are computed from other outputs are no way to these.
            values = [v.view_as(v) if isinstance(v, Tensor) and v.requires_grad else v for v in values]
            part.outputs += [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            return [Rows(v.unsqueeze(0)) if isinstance(v, Tensor) else v for v in values], rebuilt, names

        args, kwargs = self._call_of(leaves)
        with part.swapped():
            output = rows(self.forward(*args, **kwargs))
        changes = {place: value for place, value in state.changes().items() if _holds_tensors(value)}
        return _Outcome(index, part, output, {place: rows(value) for place, value in changes.items()})

    def joined(self, structure: Structure, state: State, outcomes: list[_Outcome]) -> tuple[Any, Recorded]:
        """Return the output of the batch, and write what the call changed."""
        recorded = Recorded(self.parameters, self.samples, [(out.index, out.part) for out in outcomes], structure, self._behind())

        def whole(each: Sequence[Any], layout: Layout | None) -> Any:
            rows = _rows(each, outcomes)
            if rows is None or layout is None or layout.kind == "mixed":
                return each[0].values[0] if isinstance(each[0], Rows) else each[0]
            result = layout.joined(rows)
            return graph.returned(recorded, result) if result.requires_grad else result

        leaves = [
            whole([out.output[0][at] for out in outcomes], layout) for at, layout in enumerate(structure.layouts)
        ]
        ordinary = None
        if Layout("mixed") in structure.layouts:
            now = State(self.model, structure.written, self.objects)
            state.restore()
            ordinary = self.ordinary()[1][0]
            now.restore()
            for at, layout in enumerate(structure.layouts):
                if layout == Layout("mixed"):
                    graphed = any(out.output[0][at].values.requires_grad for out in outcomes)
                    leaves[at] = graph.mixed(ordinary[at], f"output {structure.names[at]}") if graphed else ordinary[at]
        output = outcomes[0].output[1](leaves)
        if state.holds_graphs and not self._is_tracked(recorded, output):
            state.restore()
            alone = dataclasses.replace(structure, alone=_UNSEEN)
            return self.joined(alone, state, self.outcomes(alone, state))
        for kept in outcomes[0].kept if len(outcomes) == 1 else ():
            whole_tensor(kept, recorded)
        if self.undo:
            state.restore()
            return output, recorded
        attributes: dict[Place, Any] = {}
        for place in {place: None for out in outcomes for place in out.attributes}:
            trees = [out.attributes[place] for out in outcomes if place in out.attributes]
            layouts = structure.attributes.get(place)
            if layouts is None or len(layouts) != len(trees[0][0]):
                layouts = [usual(x.values.shape[1:]) if isinstance(x, Rows) else None for x in trees[0][0]]
            complete = len(trees) == len(outcomes) and len({len(tree[0]) for tree in trees}) == 1
            if complete and all(l or not isinstance(x, Rows) for l, x in zip(layouts, trees[0][0], strict=True)):
                values = [whole([tree[0][at] for tree in trees], layout) for at, layout in enumerate(layouts)]
                attributes[place] = trees[0][1](values)
            else:
                state.write(place, state.before(place))
        if structure.ordinary or (structure.writes and (len(outcomes) > 1 or outcomes[0].index is not None)):
            self._as_ordinary(state)
        for place, value in attributes.items():
            state.write(place, value)
        return output, recorded

    def _as_ordinary(self, state: State) -> None:
        """Leave attributes, buffers and random numbers as an ordinary call does."""
        state.restore()
        self.ordinary()


def _own(value: Any) -> Any:
    """Return an input that a call may write to: a copy of a tensor or of a container."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.copy(value) if isinstance(value, (set, list, dict)) else value


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in flatten(value)[0])


def _rows(each: Sequence[Any], outcomes: Sequence[_Outcome]) -> Tensor | None:
    """Return the rows of all samples ``(B, *shape)``, in the order of the batch; None for what is no tensor."""
    if not all(isinstance(x, Rows) for x in each):
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


def whole_tensor(kept: tuple[Tensor, Tensor], recorded: Recorded) -> None:
    """Turn a tensor of one sample, which someone kept, into that of the batch, if it has a row for each sample."""
    tensor, physical = kept
    if physical.dim() > 1 and physical.shape[1] == 1:
        whole = physical.flatten(0, 1)
        with contextlib.suppress(RuntimeError):  # someone else refers to it
            torch.utils.swap_tensors(tensor, graph.returned(recorded, whole) if whole.requires_grad else whole)
