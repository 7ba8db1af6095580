"""Observe a network: which module calls use which parameter, and where in their tensors the batch lies.

It runs on some samples, and on one less in reverse order. The dimension that changes its size and order is the batch.
The gradient of a chosen sample is sent back.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastgrad._torch import pytree
from fastgrad.engine.copy import Shadow, detach_plain
from fastgrad.engine.fallback import agree, dense_grads, floating
from fastgrad.engine.hooks import attach
from fastgrad.engine.layout import Layout, find_layout
from fastgrad.engine.probe import nodes_behind
from fastgrad.engine.state import RandomState
from fastgrad.engine.steps import in_place

if TYPE_CHECKING:
    from fastgrad.engine.network import Network

# Functions that broadcast a parameter over the batch, by name without underscores.
_BROADCASTING = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "div", "expand"})
#: Functions that write rows into their first argument, which keeps its other rows, by name without underscores.
_SCATTERING = frozenset({
    "setitem", "index_add", "index_put", "index_copy", "index_reduce", "masked_scatter", "scatter", "scatter_add",
    "scatter_reduce",
})  # fmt: skip
#: Those of them that write each row once.
_WRITING = frozenset({"setitem", "index_put", "index_copy", "scatter"})
#: Functions that gather along a dimension by an index.
_GATHERING = frozenset({"index_select", "gather", "take_along_dim"})
#: Functions that join rows.
_JOINING = frozenset({"cat", "concat", "concatenate", "stack", "vstack", "pad_sequence"})
#: Functions that return values to Python, which may choose rows by them.
_ARRAYS = frozenset({"numpy", "__array__"})
_READING = _ARRAYS | {"tolist", "item", "__bool__", "__float__", "__index__", "__int__"}
#: Functions that make tensors from Python's values.
_MAKING = frozenset({"tensor", "as_tensor", "asarray"})
#: Functions that draw random numbers.
_DRAWING = frozenset({"randperm", "randint", "rand", "randn", "multinomial", "bernoulli"})


class Rows:
    """Tracks tensors of a forward pass on ``inputs`` whose rows are reordered, or gathered by a computed index.

    A mixture of experts hands each expert the tokens that chose it, of any samples, by an index or a product with zeros
    and ones. A model may sort its samples by length. The number and order of rows in such a tensor do not show
    where a sample lies in it.
    """

    def __init__(self, inputs: Any, fewer: Rows | None = None) -> None:
        # By id. The tensors are held, so that no other one gets the same id.
        self._computed = _tensors_in(inputs)
        self._gathered: dict[int, Tensor] = {}
        # Names of functions by which Python has read values that were computed from the batch.
        self._read: set[str] = set()
        # Numbers of rows among which Python may have chosen, here and with ``fewer`` samples.
        self._lengths: list[tuple[int, ...]] = []
        self._fewer = fewer._lengths if fewer else []

    @property
    def gathers(self) -> bool:
        """Whether rows were gathered or reordered at all."""
        return bool(self._gathered)

    def gathered(self, tree: Any) -> bool:
        """Whether a tensor in ``tree`` holds gathered rows."""
        return not self._gathered.keys().isdisjoint(_tensors_in(tree))

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take note of a call of a function."""
        full = getattr(function, "__name__", "")
        name = full.strip("_")
        # expand_as uses the shape of its second argument, not the values.
        made = name in _DRAWING or (self._read and name in _MAKING)
        if not made and not self._computed_in(args[:1] if name == "expand_as" else (args, kwargs)):
            return
        self._read |= {full} & _READING
        # A tensor that is written to in place is then computed from what is written.
        first = args[0] if args else None
        written = (result, first) if in_place(full) else result
        self._computed |= _tensors_in(written)
        gathers = self._gathers(name, args, kwargs, result)
        if gathers or self.gathered(first if name in _SCATTERING else (args, kwargs)):
            self._gathered |= _tensors_in(written)

    def _gathers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        if name == "einsum" and isinstance(args[0], str):
            # Whether rows of several tensors computed from the batch are multiplied and added up.
            terms, _, kept = args[0].replace(" ", "").partition("->")
            pairs = zip(terms.split(","), pytree.tree_leaves(args[1:]), strict=True)
            first = [term[0] for term, tensor in pairs if term and id(tensor) in self._computed]
            return any(first.count(letter) > 1 and letter not in kept for letter in first)
        if name in _WRITING and len(args) > 2:
            # Rows are written in another order, unless gathered rows are put back. A mask keeps the order.
            *dim, index, source = args
            moved = [i for i in _tensors_in(_leading(index)).values() if i.dtype != torch.bool]
            of_rows = len(dim) < 2 or dim[1] in (0, -args[0].dim())
            chosen = self._computed_in(moved) or self._chosen(args[0], index, int)
            return of_rows and chosen and self._computed_in(source) and not self.gathered(source)
        if name in _JOINING and self._read:
            dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
            return name == "pad_sequence" or (dim in (0, -result.dim()) and self._grows(result))
        if not args or id(args[0]) not in self._computed:
            return False
        if name == "masked_select":
            return True
        if name == "getitem":
            return self._computed_in(_leading(args[1])) or self._chosen(args[0], args[1])
        rest = [*args[1:], *kwargs.values()]
        if name == "take":
            return self._computed_in(rest)
        if name in ("matmul", "mm", "linear", "embedding"):
            return rest[0].dim() == 2 and self._computed_in(rest[0])
        if name in _GATHERING:
            given = {"dim": args[1] if len(args) > 1 else None} | kwargs
            return given["dim"] in (0, -args[0].dim()) and self._computed_in(rest)
        return False

    def _chosen(self, rows: Tensor, index: Any, *types: type) -> bool:
        """Whether an index of ``rows``, also one of ``types``, may come from values that Python read."""
        # No function is seen that makes a tensor share an array's memory.
        types = (*types, Tensor) if self._read & _ARRAYS else types
        return bool(self._read) and isinstance(_leading(index), (list, np.ndarray, *types)) and self._grows(rows)

    def _grows(self, rows: Tensor) -> bool:
        """Whether fewer samples have fewer rows, or this is not known; the number of steps or layers stays the same."""
        self._lengths.append(rows.shape[:1])
        return rows.shape[:1] not in self._fewer[len(self._lengths) - 1 :][:1]

    def _computed_in(self, tree: Any) -> bool:
        return not self._computed.keys().isdisjoint(_tensors_in(tree))


def _leading(index: Any) -> Any:
    """Return the part of an index that selects along the first dimension."""
    return next((i for i in index if i is not None), ()) if isinstance(index, tuple) else index


def _tensors_in(tree: Any) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


@dataclass
class Call:
    """One call of a module."""

    module: nn.Module  # the user's, in whose place ``copy`` ran
    copy: nn.Module
    path: str  # the module's name within the model
    chain: tuple[int, ...]  # numbers of the enclosing calls, outermost first, and its own
    ordinal: int  # how many earlier calls of the module there were
    inputs: list[tuple[int, ...] | None]  # shape of every leaf of its inputs, None for what is no tensor
    gathered: bool  # whether rows of inputs or outputs were gathered, see `Rows`
    outputs: list[Tensor] = field(default_factory=list)  # floating-point ones, without their graph
    precision: float = 0.0  # the relative rounding error of the coarsest numbers that it computed
    hooked: bool = False  # whether it, or a call within it, has hooks of gradients
    # By number of the output, its gradient, once that of the chosen sample was sent back.
    gradients: dict[int, Tensor] = field(default_factory=dict)


def _keep(passes: list[None], gradients: dict[int, Tensor], position: int, gradient: Tensor) -> None:
    """Add up one output's gradients in the first backward pass; later passes are for other samples."""
    if len(passes) == 1:
        known = gradients.get(position)
        gradients[position] = gradient if known is None else known + gradient


class Observation(TorchFunctionMode):
    """What a network's model does with a few samples; ``fewer`` has observed one less, those in ``less``.

    ``training`` as for `Shadow`. ``rounded`` changes every parameter by about one unit in the last place.

    Attributes:
        calls: All calls of modules; ``stack`` has the numbers of those under way.
        bytes: Size of all calls' outputs.
        precision: The relative rounding error of the coarsest numbers that functions computed from others.
        parameters: By name, the leaf that stood in for each parameter.
        uses: By name, the numbers of the calls that use a parameter.
        ranks: By name, the numbers of dimensions of results that broadcast it over the batch, and None for other uses.
        rows: Which tensors hold gathered rows.
        functions: Names of all functions that returned tensors, in order.
        drew: Whether random numbers were drawn.
        outputs: The tensors whose gradients matter in what the model returned.
        made: Names of parameters that the model made in forward.
        untracked: Names of parameters used other than through modules' attributes: from a closure, or through a tensor
            that an earlier call computed from them and kept.
    """

    def __init__(
        self,
        network: Network,
        inputs: tuple[Any, Any],
        samples: int,
        *,
        fewer: Observation | None = None,
        less: Sequence[int] = (),
        training: bool = False,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        model, self.samples = network.model, samples
        self.calls: list[Call] = []
        self.stack = [-1]
        self.bytes, self.precision = 0, 0.0
        self.parameters: dict[str, Tensor] = {}
        self.rows: Rows = Rows(inputs, fewer.rows if fewer else None)
        self.functions: list[str] = []
        self.untracked: set[str] = set()
        # One entry for each backward pass that has begun.
        self._passes: list[None] = []
        self._times: Counter[str] = Counter()
        self._fewer = {} if fewer is None else {(call.path, call.ordinal): call for call in fewer.calls}
        self._less = list(less)
        # Names by id: of the user's own parameters, and of their stand-ins. A model may override named_parameters, to
        # return only some of them, as for an optimizer, or other names.
        named = (*nn.Module.named_parameters(model), *model.named_parameters())
        self._originals = names = {id(p): name for name, p in named}
        self._tracked: dict[int, str] = {}
        self.uses: dict[str, set[int]] = {name: set() for name in names.values()}
        self.ranks: dict[str, set[int | None]] = {name: set() for name in names.values()}

        def leaf(parameter: nn.Parameter) -> Tensor:
            value = detach_plain(parameter)
            if value.is_floating_point():
                if rounded:
                    signs = torch.arange(value.numel(), device=value.device).cos().sign().reshape(value.shape)
                    value = value * (1 + torch.finfo(value.dtype).eps * signs.to(value.dtype))
                value.requires_grad_()
            name = names[id(parameter)]
            self.parameters[name], self._tracked[id(value)] = value, name
            return value

        shadow = Shadow(model, leaf, training=training, recorded=network.recorded)
        for path, original in model.named_modules():
            self._watch(original, shadow.modules[id(original)], path)
        before = RandomState(model.modules())
        with self:
            output = shadow(*inputs[0], **inputs[1])
        self.drew = not before.same()
        own = set(map(id, self.parameters.values()))
        # A computed tensor that the model puts in place of a parameter is not a parameter that it made.
        leaves = ((name, p) for name, p in nn.Module.named_parameters(shadow.root) if p.requires_grad and p.is_leaf)
        self.made = [name for name, p in leaves if id(p) not in own]
        # Other values may choose another path. Sets, because a loop over fewer samples calls functions less often.
        self._alike = fewer is not None and set(fewer.functions) == set(self.functions) and not self.drew
        self.outputs = network.tensors(output)
        reached = (id(getattr(node, "variable", None)) for node in nodes_behind(floating(output)))
        self.untracked |= {names[key] for key in reached if key in names}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note in which module call it uses a parameter differentiably."""
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        found = [self._tracked[id(leaf)] for leaf in leaves if id(leaf) in self._tracked]
        tensors = [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]
        if tensors:
            self.functions.append(getattr(func, "__name__", ""))
            # Making a mask of zeros computes nothing. Models in float64 may have parts in float32.
            if floating(args):
                eps = max((torch.finfo(t.dtype).eps for t in floating(tensors)), default=0.0)
                self.precision = max(self.precision, eps)
                for call in map(self.calls.__getitem__, self.stack[1:]):
                    call.precision = max(call.precision, eps)
            self.untracked |= {self._originals[id(leaf)] for leaf in leaves if id(leaf) in self._originals}
        elif isinstance(result, (RemovableHandle, Node)):
            # Code that asks for a node of the graph may put a hook on it, as PyTorch does for modules' hooks.
            for call in map(self.calls.__getitem__, self.stack[1:]):
                call.hooked = True
        gathered = bool(found) and self.rows.gathered((args, kwargs))
        self.rows.note(func, args, kwargs or {}, result)
        if found and tensors:
            name = getattr(func, "__name__", "").strip("_")
            broadcast = name in _BROADCASTING and result.shape[:1] == (self.samples,) and not gathered
            for name in found:
                self.ranks[name].add(result.dim() if broadcast else None)
                if any(r.requires_grad for r in tensors):
                    self.uses[name].add(self.stack[-1])
        return result

    def _watch(self, original: nn.Module, copy: nn.Module, path: str) -> None:
        # Weakly: the calls hold the copy, and so its hooks.
        own = weakref.proxy(self)

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            own.stack.append(len(own.calls))
            leaves = pytree.tree_leaves((args, kwargs))
            inputs = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
            gathered, chain = own.rows.gathered(leaves), tuple(own.stack[1:])
            own.calls.append(Call(original, copy, path, chain, own._times[path], inputs, gathered))
            own._times[path] += 1

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Calls that raised an error, which their callers caught, did not leave.
            while (call := own.calls[own.stack.pop()]).copy is not copy:
                pass
            call.gathered = call.gathered or own.rows.gathered(output)
            for position, tensor in enumerate(floating(output)):
                call.outputs.append(tensor.detach())
                own.bytes += tensor.numel() * tensor.element_size()
                if tensor.requires_grad:
                    # The graph holds the hook. If the hook held the graph, no garbage collector would find the cycle.
                    tensor.register_hook(functools.partial(_keep, own._passes, call.gradients, position))

        attach(copy, enter, before=True)
        attach(copy, leave)

    def backward(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Send one sample's gradient back, first the chosen one's, and return gradients of parameters by name."""
        self._passes.append(None)
        leaves = {n: p for n, p in self.parameters.items() if p.requires_grad}
        try:
            found = dense_grads(self.outputs, list(leaves.values()), gradients, keep=True)
        except RuntimeError as error:
            # An error of the first pass does not come from repeating it.
            if len(self._passes) == 1 or "Trying to backward" not in str(error):
                raise
            raise ValueError(
                "model must bear several backward passes through one forward pass, as selective checkpointing does "
                f"not; in a trial the next one raised {type(error).__name__}: {error}"
            ) from error
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def once(self, call: Call) -> bool:
        """Whether the call's module is called only once."""
        return self._times[call.path] == 1

    def enclosing(self, uses: set[int]) -> list[Call]:
        """Return the calls that contain all of ``uses``, innermost first."""
        first, *rest = [self.calls[index].chain if index >= 0 else () for index in uses]
        return [self.calls[index] for index in reversed(first) if all(index in chain for chain in rest)]

    def output_layouts(self, call: Call) -> list[Layout | None]:
        """Return where the batch lies in each floating-point output of a call."""
        other = self._fewer.get((call.path, call.ordinal))
        if other is None or len(other.outputs) != len(call.outputs):
            return [None]
        shown = self.drew or any(bool(gradient.any()) for gradient in call.gradients.values())
        layouts: list[Layout | None] = []
        for i, (out, less) in enumerate(zip(call.outputs, other.outputs, strict=True)):
            gradient = call.gradients.get(i)
            layout = find_layout(tuple(out.shape), tuple(less.shape), gradient, self.samples)
            decided = self._alike and call.path and gradient is not None
            if layout and layout.kind != "single" and (decided or not shown):
                # Gradients do not show an order that values decide. It is that of the inputs if a sample's rows are the
                # same among fewer samples. A single row has no order.
                rows, fewer = layout.batch_first(out, self.samples), layout.batch_first(less, self.samples - 1)
                same = (len(fewer) > 1 or not decided) and agree(fewer, rows[self._less], self.precision)
                layout = layout if same else None
            layouts.append(layout)
        return layouts

    def batched_leaves(self, call: Call) -> tuple[bool, ...] | None:
        """Return which input leaves of a call carry the batch in dimension 0; None if it lies elsewhere."""
        other = self._fewer.get((call.path, call.ordinal))
        if other is None or len(call.inputs) != len(other.inputs):
            return None
        flags = []
        for more, less in zip(call.inputs, other.inputs, strict=True):
            if more is None or less is None or more == less:
                flags.append(False)
                continue
            layout = find_layout(more, less, None, self.samples)
            if layout is None or layout.kind not in ("plain", "folded"):
                return None
            flags.append(True)
        return tuple(flags)
