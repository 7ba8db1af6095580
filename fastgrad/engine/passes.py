"""A forward pass of a model on each sample of a batch: together under vmap, in groups by what it reads, or alone."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad._torch import StopRecomputation, has_global_hooks, hooks_of, pytree, saved_tensor_hooks, vmap
from fastgrad.batches import batch_size, same_class, take
from fastgrad.engine.layout import Stacked, Tree, flatten, is_object
from fastgrad.engine.mode import PerSample, Split
from fastgrad.engine.modules import replaced
from fastgrad.engine.state import Place, State
from fastgrad.engine.structure import Alone, Structure
from fastgrad.layers import MODULES
from fastgrad.layers.call import CHECKPOINT, Call, NotPerSampleError, Refused, RuleError
from fastgrad.memory import lacks_memory


@dataclass
class Outcome:
    """The result of one part of a batch: outputs and changed attributes, whose tensors are `Stacked`."""

    index: Tensor | None  # which samples; None for all
    part: Call | Alone
    output: Tree
    attributes: dict[Place, Tree]
    #: Tensors of one sample that outlived the call, for example in a hook's list, and the batches behind them.
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Plain(TorchFunctionMode):
    """Watches results and writes of an ordinary call, and like `PerSample` keeps attention from its fused paths."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes, self.precision = 0, 0.0
        self.checkpoints, self._hooks = False, saved_tensor_hooks()
        self._places = {p.data_ptr(): p for p in parameters}
        #: By id, each parameter that was written to, and its earlier value.
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            p = self._places.get(args[0].data_ptr())
            if p is not None:
                self.written.setdefault(id(p), (p, p.detach().clone()))
        out = func(*args, **(kwargs or {}))
        self.checkpoints |= saved_tensor_hooks() != self._hooks
        if isinstance(out, Tensor):
            self.bytes += out.numel() * out.element_size()
            if out.is_floating_point():
                self.precision = max(self.precision, torch.finfo(out.dtype).eps)
        return out


class Pass:
    """A call of ``forward``, the forward pass of ``model``; ``parameters`` are those with wanted gradients, by id.

    With ``undo`` the model is left as it was, and ``forward`` calls the model together with its hooks. ``modules`` are
    the modules of ``model`` with their paths.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, parameters: Mapping[int, Tensor],
        *, undo: bool, modules: Sequence[tuple[str, nn.Module]] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.forward, self.parameters, self.undo = model, forward, parameters, undo
        self.samples = batch_size(args, kwargs)
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        #: Inputs that may hold tensors in attributes, such as caches.
        self.objects = [x for x in self.leaves if is_object(x)]
        self.modules = list(model.named_modules()) if modules is None else modules
        self.numbers = range(0)
        self.training = any(module.training for _, module in self.modules)
        self.hooks = sum(len(table) for _, module in self.modules for table in hooks_of(module))

    def key(self) -> Any:
        """Return a key for the structure of the inputs and the state of the model."""
        inputs = tuple(
            (x.dim(), x.dtype, bool(x.dim()) and x.shape[0] == self.samples, x.requires_grad)
            if isinstance(x, Tensor)
            else (x if isinstance(x, bool) else type(x))
            for x in self.leaves
        )
        return inputs, self.spec, self.samples == 1, self.training, self.hooks, len(MODULES)

    def call_of(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that have these leaves."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def copied_leaves(self) -> list[Any]:
        """Return the inputs' leaves, copied if a call may write to them."""
        return [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else _copied_container(x)
            for x in self.leaves
        ]

    def ordinary(self) -> tuple[Plain, Tree]:
        """Call the model on the whole batch; its outputs have no graph."""
        # Gradients are enabled, as in the call itself, because hooks of tensors need them.
        args, kwargs = self.call_of(self.copied_leaves())
        with warnings.catch_warnings(), Plain(self.parameters.values()) as plain:
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            values, rebuilt, names = flatten(self.forward(*args, **kwargs))
        # Autocast caches casts of parameters, and these belong to another graph.
        torch.clear_autocast_cache()
        return plain, ([v.detach() if isinstance(v, Tensor) else v for v in values], rebuilt, names)

    def outcomes(self, structure: Structure, state: State) -> list[Outcome]:
        """Run all samples: together, in groups with the same values wherever the model reads a value, or alone."""
        found: list[Outcome] = []
        waiting: list[Tensor | None] = [None]
        if not structure.alone_reason and self._hooks_gradients():
            structure.alone_reason = "a hook may change its gradients (full backward hook)"
            structure.custom_backward = True
        while waiting:
            index = waiting.pop(0)
            again, leaves = False, self.leaves
            if index is not None:
                leaves = take(leaves, index, self.samples, structure.carriers)
            with state.own_buffers() if self.undo or found or index is not None else contextlib.nullcontext():
                try:
                    if structure.alone_reason:
                        found += self._alone(structure, state, leaves, index)
                    else:
                        found.append(self._together(structure, state, leaves, index))
                except Split as split:
                    whole = torch.arange(self.samples, device="cpu") if index is None else index
                    values = split.values.to(whole.device)
                    groups: list[Tensor | None] = [whole[(values == v).all(1)] for v in values.unique(dim=0)]
                    waiting, again = groups + waiting, True
                except (NotPerSampleError, StopRecomputation):
                    raise
                except Exception as error:
                    if lacks_memory(error):
                        raise
                    if structure.alone_reason or isinstance(error, RuleError):
                        raise self._of_samples(error, state) from error
                    _other_way(structure, error)
                    waiting, found, again = [None], [], True
            if again or waiting:
                state.restore()
        return found

    def _of_samples(self, error: Exception, state: State) -> Exception:
        """Return the error to raise if a rule or a sample alone fails: the model's own if the batch fails as well."""
        state.restore()
        try:
            self.ordinary()
        except Exception as own:
            return own if isinstance(error, RuleError) else error
        state.restore()
        if isinstance(error, RuleError):
            return error
        return NotPerSampleError(
            "model must run on each sample alone, as a batch of one; it runs on the batch, but one sample raised "
            f"{type(error).__name__}: {error}"
        )

    def _hooks_gradients(self) -> bool:
        """Whether a module that runs inside the call has hooks of gradients."""
        modules = [m for _, m in self.modules if m is not self.model or self.undo] if self.hooks else []
        return has_global_hooks(backward=True) or any(m._backward_hooks or m._backward_pre_hooks for m in modules)

    def _together(self, structure: Structure, state: State, leaves: list[Any], index: Tensor | None) -> Outcome:
        carried = [i for i, carries in enumerate(structure.carriers) if carries]
        # A tensor that is given twice stays one object: attention checks whether query and key are identical.
        unique = {id(leaves[i]): leaves[i] for i in carried}
        count = self.samples if index is None else len(index)
        call = Call(self.parameters, count, index, self.samples, structure.batch_new_tensors)
        seen: list[weakref.ref[Tensor]] | None = [] if self.hooks or has_global_hooks() else None
        made: list[Outcome] = []

        def rows(tree: Any) -> Tree:
            values, rebuilt, names = flatten(tree)
            every = [Stacked(call.spread(v)) if isinstance(v, Tensor) else v for v in values]
            return every, rebuilt, names

        def one(*tensors: Tensor) -> Tensor:
            call.begin()
            pairs = zip(unique.items(), tensors, strict=True)
            of_sample = {key: same_class(x.unsqueeze(0), given) for (key, given), x in pairs}
            own = [_copied_container(x) for x in leaves]
            for i in carried:
                own[i] = of_sample[id(leaves[i])]
            args, kwargs = self.call_of(own)
            with replaced(self.model, call), PerSample(call, seen):
                output = self.forward(*args, **kwargs)
            made.append(Outcome(index, call, rows(output), _written(state, rows)))
            return tensors[0].detach()

        try:
            vmap(one, randomness="different")(*unique.values())
        except (TypeError, AttributeError, NameError) as error:
            if error is not call.rule_failure:
                raise
            raise RuleError(f"a layer rule raised {type(error).__name__}: {error}") from error
        alive = {id(t): t for ref in seen or () if (t := ref()) is not None}
        made[0].kept = [(t, call.physical(t)) for t in alive.values()]
        return made[0]

    def _alone(self, structure: Structure, state: State, leaves: list[Any], index: Tensor | None) -> Iterator[Outcome]:
        for i in range(self.samples if index is None else len(index)):
            if i:
                state.restore(numbers=False)
            own = [_copied_container(x) for x in take(leaves, slice(i, i + 1), self.samples, structure.carriers)]
            with state.own_buffers():
                # When a checkpoint computes again, it uses the parameters that the model holds at that time.
                thaws = self.undo or not structure.checkpoints
                part = Alone(self.model, self.parameters if thaws else {})
                yield self._sample(
                    part, state, own, torch.tensor([i], device="cpu") if index is None else index[i : i + 1]
                )

    def _sample(self, part: Alone, state: State, leaves: list[Any], index: Tensor) -> Outcome:
        def rows(tree: Any) -> Tree:
            values, rebuilt, names = flatten(tree)
            # Views, so that the gradient of one output does not include paths through another.
            values = [v.view_as(v) if isinstance(v, Tensor) and v.requires_grad else v for v in values]
            part.outputs += [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            return [Stacked(v.unsqueeze(0)) if isinstance(v, Tensor) else v for v in values], rebuilt, names

        args, kwargs = self.call_of(leaves)
        with part.swapped():
            output = rows(self.forward(*args, **kwargs))
        return Outcome(index, part, output, _written(state, rows))


def _copied_container(x: Any) -> Any:
    return copy.copy(x) if isinstance(x, (set, list, dict)) else x


def _other_way(structure: Structure, error: Exception) -> None:
    """Note how to run a model that vmap refused."""
    structure.custom_backward |= isinstance(error, Refused) and error.hooked
    text = str(error).partition("\n")[0]
    structure.checkpoints |= text == CHECKPOINT
    if not structure.batch_new_tensors and "vmap" in text and "inplace" in text.replace("in-place", "inplace"):
        structure.batch_new_tensors = True
    else:
        structure.alone_reason = text or type(error).__name__


def _written(state: State, rows: Callable[[Any], Tree]) -> dict[Place, Tree]:
    """Return the changed attributes that hold tensors."""
    changes = state.changes()
    state.changed |= changes.keys()
    found = {place: rows(value) for place, value in changes.items()}
    return {place: tree for place, tree in found.items() if any(isinstance(leaf, Stacked) for leaf in tree[0])}
