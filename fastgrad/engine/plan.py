"""Deciding, parameter by parameter, how its squared norms are found.

The network is watched once on three samples: which module calls use which parameter, where in each output the
batch lies, and whether samples are independent. Only the gradient of the middle sample is sent back, so
wherever it arrives shows the place of a sample's numbers in that tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad._torch import pytree
from fastgrad.engine.shadow import Shadow, attach, ordinary
from fastgrad.layers.norm import mixes_samples
from fastgrad.layers.registry import LayerRule, ReplayRule, find_rule

SAMPLES = 3
_MIDDLE = 1
# Functions that broadcast a parameter over the batch, by name without underscores.
_BROADCASTING = frozenset(
    {"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "div", "expand"}
)


@dataclass(frozen=True)
class Layout:
    """Where the batch lies in a layer's tensors.

    ``plain``: dimension 0. ``folded``: dimension 0 holds several rows per sample, sample by sample. ``moved``:
    dimension ``dim``. ``single``: dimension 0 has size 1 and is broadcast over the batch later on.
    """

    kind: Literal["plain", "folded", "moved", "single"]
    dim: int = 0

    def batch_first(self, x: Tensor, samples: int) -> Tensor:
        """``x`` as a tensor with the batch in dimension 0, further rows of a sample in dimension 1."""
        if self.kind == "folded":
            return x.reshape(samples, -1, *x.shape[1:])
        if self.kind == "moved":
            return x.movedim(self.dim, 0)
        if self.kind == "single":
            return x.expand(samples, *x.shape[1:])
        return x


@dataclass(frozen=True)
class Site:
    """One place where squared norms leave the backward pass.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        rule: The layer rule, or None for the general fallback and for a broadcast parameter.
        parameters: Names within the model, in the order of the columns.
        local: The same parameters by the names the rule gives them.
        layout: Place of the batch (layer rules).
        batched: For each leaf of the inputs, whether it carries the batch (replays and fallback).
        vectorize: Whether the fallback can run under ``vmap``.
        rank: For a parameter that is only broadcast over the batch, the number of dimensions it is given, one
            copy per sample; else 0.
    """

    path: str
    rule: LayerRule | ReplayRule | None
    parameters: tuple[str, ...]
    local: tuple[str, ...]
    layout: Layout = Layout("plain")
    batched: tuple[bool, ...] = ()
    vectorize: bool = True
    rank: int = 0


@dataclass(frozen=True)
class Route:
    """What `GradientFeatures.report` says about one parameter."""

    parameter: str
    route: str
    module: str
    reason: str


@dataclass
class Plan:
    """The sites of one model for one structure of inputs, and why."""

    names: tuple[str, ...]
    sites: list[Site]
    routes: dict[str, Route]
    #: Bytes of layer outputs per input element, to estimate memory.
    bytes_per_element: float = 0.0
    unused: tuple[str, ...] = ()


@dataclass
class _Call:
    """One call of a module, as watched."""

    index: int
    module: nn.Module
    path: str
    parent: int
    ordinal: int
    inputs: list[tuple[int, ...] | None]
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


class _Uses(TorchFunctionMode):
    """Notes which calls hand a parameter to a differentiable function."""

    def __init__(self, parameters: dict[int, str], current: Callable[[], int]) -> None:
        super().__init__()
        self.parameters, self.current = parameters, current
        self.uses: dict[str, set[int]] = {name: set() for name in parameters.values()}
        #: Number of dimensions in which a parameter is broadcast over the batch, None where it is used otherwise.
        self.ranks: dict[str, set[int | None]] = {name: set() for name in parameters.values()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        found = [self.parameters[id(leaf)] for leaf in leaves if id(leaf) in self.parameters]
        if found and any(isinstance(r, Tensor) and r.requires_grad for r in pytree.tree_leaves(result)):
            broadcast = getattr(func, "__name__", "").strip("_") in _BROADCASTING and result.shape[:1] == (
                SAMPLES,
            )
            for name in found:
                self.uses[name].add(self.current())
                self.ranks[name].add(result.dim() if broadcast else None)
        return result


def shapes(tree: Any) -> list[tuple[int, ...] | None]:
    """Shape of every tensor leaf, None for other leaves."""
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(tree)]


class Observation:
    """One watched forward pass.

    Args:
        model: The user's model; only read.
        args: Its positional inputs.
        kwargs: Its inputs by keyword.
        paths: Name of each module by id.
        names: Name of each parameter by id.
    """

    def __init__(
        self, model: nn.Module, args: Any, kwargs: Any, paths: dict[int, str], names: dict[int, str]
    ) -> None:
        self.calls: list[_Call] = []
        self.stack: list[int] = []
        self.times: dict[str, int] = {}
        self.parameters: dict[str, Tensor] = {}
        self.bytes = 0
        tracked: dict[int, str] = {}

        def leaf(parameter: nn.Parameter) -> Tensor:
            value = ordinary(parameter)
            if value.is_floating_point():
                value.requires_grad_()
            name = names[id(parameter)]
            self.parameters[name] = value
            tracked[id(value)] = name
            return value

        shadow = Shadow(model, leaf)
        for original in model.modules():
            self._watch(original, shadow.modules[id(original)], paths[id(original)])
        with torch.enable_grad(), _Uses(tracked, lambda: self.stack[-1]) as uses:
            self.output = shadow.root(*args, **kwargs)
        self.uses, self.ranks = uses.uses, uses.ranks

    def _watch(self, original: nn.Module, copy: nn.Module, path: str) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            index = len(self.calls)
            parent = self.stack[-1] if self.stack else -1
            ordinal = self.times[path] = self.times.get(path, -1) + 1
            self.calls.append(_Call(index, original, path, parent, ordinal, shapes((args, kwargs))))
            self.stack.append(index)

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.calls[self.stack.pop()]
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    position = len(call.outputs)
                    call.outputs.append(tuple(tensor.shape))
                    self.bytes += tensor.numel() * tensor.element_size()
                    if tensor.requires_grad:
                        self._keep_gradient(call, position, tensor)

        attach(copy, enter, before=True)
        attach(copy, leave)

    @staticmethod
    def _keep_gradient(call: _Call, position: int, tensor: Tensor) -> None:
        def keep(gradient: Tensor) -> None:
            known = call.gradients.get(position)
            call.gradients[position] = gradient if known is None else known + gradient

        tensor.register_hook(keep)


def _block_only(gradient: Tensor, dim: int, rows: int) -> bool:
    """Whether the gradient vanishes outside the middle sample's rows of one dimension."""
    outside = gradient.detach().clone()
    outside.narrow(dim, _MIDDLE * rows, rows).zero_()
    return not bool(outside.any())


def find_layout(shape: tuple[int, ...], other: tuple[int, ...], gradient: Tensor | None) -> Layout | None:
    """Place of the batch from a tensor's shapes at three and two samples and the middle sample's gradient."""
    if len(shape) != len(other) or not shape:
        return None
    changed = [d for d, (three, two) in enumerate(zip(shape, other, strict=True)) if three != two]
    if not changed:
        return Layout("single") if shape[0] == 1 and len(shape) > 1 else None
    if len(changed) > 1:
        return None
    dim = changed[0]
    rows, remainder = divmod(shape[dim], SAMPLES)
    if remainder or other[dim] != rows * (SAMPLES - 1):
        return None
    if gradient is not None and not _block_only(gradient, dim, rows):
        return None
    if rows == 1:
        return Layout("plain") if dim == 0 else Layout("moved", dim)
    return Layout("folded") if dim == 0 else None


def batched_leaves(call: _Call, other: _Call) -> tuple[bool, ...] | None:
    """Which input leaves carry the batch in dimension 0; None where it lies elsewhere."""
    flags = []
    if len(call.inputs) != len(other.inputs):
        return None
    for three, two in zip(call.inputs, other.inputs, strict=True):
        if three is None or two is None or three == two:
            flags.append(False)
            continue
        layout = find_layout(three, two, None)
        if layout is None or layout.kind not in ("plain", "folded"):
            return None
        flags.append(True)
    return tuple(flags)


def refuse_mixing(model: nn.Module, *, training: bool) -> None:
    """Raise ValueError for a batch norm that normalises with the statistics of the batch.

    Args:
        model: The model.
        training: Whether modules run in their own mode rather than in evaluation mode.
    """
    for path, module in model.named_modules():
        if (training and mixes_samples(module)) or (
            mixes_samples(module) and getattr(module, "running_mean", None) is None
        ):
            why = "is in training mode" if module.training and training else "keeps no running statistics"
            raise ValueError(
                f"model must not mix the samples of a batch, or there is no gradient per sample; its batch norm "
                f"{path or type(model).__name__!r} {why}, so it normalises with the statistics of the batch"
                + (" (call model.eval())" if "training" in why else "")
            )


class Planner:
    """Makes the plan of one model from two observations.

    Args:
        model: The user's model.
        names: Wanted parameter names by id, in order.
        paths: Module names by id.
    """

    def __init__(self, model: nn.Module, names: dict[int, str], paths: dict[int, str]) -> None:
        self.model, self.names, self.paths = model, names, paths
        self.by_name = {name: p for p, name in ((p, names.get(id(p))) for p in model.parameters()) if name}

    def observe(self, args: Any, kwargs: Any, fewer_args: Any, fewer_kwargs: Any) -> None:
        """Watch the model on three samples and on two."""
        everything = {id(p): name for name, p in self.model.named_parameters()}
        self.three = Observation(self.model, args, kwargs, self.paths, everything)
        with torch.no_grad():
            two = Observation(self.model, fewer_args, fewer_kwargs, self.paths, everything)
        self.two = {(call.path, call.ordinal): call for call in two.calls}
        self.two_output = two.output
        self.times: dict[int, int] = {}
        for call in self.three.calls:
            self.times[id(call.module)] = self.times.get(id(call.module), 0) + 1

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Send the middle sample's gradient back; returns its true gradient of every parameter."""
        leaves = {n: p for n, p in self.three.parameters.items() if p.requires_grad}
        if not leaves or not any(out.requires_grad for out in outputs):
            return {}
        found = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def _chain(self, index: int) -> list[int]:
        chain = []
        while index >= 0:
            chain.append(index)
            index = self.three.calls[index].parent
        return chain

    def _enclosing(self, uses: set[int]) -> list[int]:
        """Calls that contain all uses, innermost first."""
        first, *rest = [self._chain(index) for index in uses]
        return [index for index in first if all(index in chain for chain in rest)]

    def _output_layouts(self, call: _Call) -> list[Layout | None]:
        other = self.two.get((call.path, call.ordinal))
        if other is None or len(other.outputs) != len(call.outputs):
            return [None]
        return [
            find_layout(shape, two, call.gradients.get(i))
            for i, (shape, two) in enumerate(zip(call.outputs, other.outputs, strict=True))
        ]

    def _local_names(self, call: _Call) -> dict[str, str]:
        """The module's parameters: name within the module by name within the model."""
        return {
            self.names[id(p)]: local
            for local, p in call.module.named_parameters(remove_duplicate=True)
            if id(p) in self.names
        }

    def _with_rule(self, call: _Call, name: str) -> tuple[Site | None, str]:
        """A site with a layer rule for one parameter, or the reason against it."""
        rule, reason = find_rule(call.module)
        if rule is None:
            return None, reason
        local = self._local_names(call).get(name)
        allowed = set(call.module._parameters) | set(rule.children if isinstance(rule, ReplayRule) else ())
        if local not in allowed:
            return None, f"it is used by {type(call.module).__name__}, whose rule does not know it"
        if self.times[id(call.module)] > 1:
            return None, "its module is called more than once"
        if isinstance(rule, ReplayRule):
            other = self.two.get((call.path, call.ordinal))
            batched = batched_leaves(call, other) if other is not None else None
            return Site(call.path, rule, (name,), (local,), batched=batched or ()), ""
        layouts = self._output_layouts(call)
        if len(layouts) != 1 or layouts[0] is None:
            return None, "the batch was not found in its module's output"
        layout = layouts[0]
        if layout.kind in ("folded", "moved") and not rule.positions:
            return None, f"its module gets the batch in another layout ({layout.kind})"
        return Site(call.path, rule, (name,), (local,), layout=layout), ""

    def _with_fallback(self, uses: set[int], name: str) -> Site:
        """The innermost module, called once, that contains all uses and sees the batch in dimension 0."""
        enclosing = self._enclosing(uses)
        for index in enclosing:
            call = self.three.calls[index]
            if self.times[id(call.module)] > 1:
                continue
            other = self.two.get((call.path, call.ordinal))
            batched = batched_leaves(call, other) if other is not None else None
            layouts = self._output_layouts(call)
            if batched is None or not any(batched):
                continue
            if layouts and all(x is not None and x.kind in ("plain", "folded") for x in layouts):
                return Site(call.path, None, (name,), (name,), batched=batched)
        raise ValueError(
            f"model must treat the samples of a batch independently, batch in dimension 0 of inputs and outputs; "
            f"no part of it that contains all uses of {name!r} does"
        )

    def _broadcast(self, name: str) -> Site | None:
        """A site for a parameter that every use broadcasts over the batch: one copy per sample serves as well."""
        ranks = self.three.ranks[name]
        parameter = self.three.parameters[name]
        if len(ranks) != 1:
            return None
        rank = next(iter(ranks))
        if rank is None or not (
            rank > parameter.dim() or (rank == parameter.dim() and parameter.shape[0] == 1)
        ):
            return None
        return Site(name.rpartition(".")[0], None, (name,), (name,), rank=rank)

    def plan(
        self,
        forced: frozenset[str] = frozenset(),
        loops: frozenset[str] = frozenset(),
        *,
        speculate: bool = True,
    ) -> Plan:
        """Choose a route for every wanted parameter.

        Args:
            forced: Parameters that must take the fallback at the model itself.
            loops: Paths of modules which ``vmap`` cannot take.
            speculate: Whether to give broadcast parameters one copy per sample (which the trial must confirm).
        """
        single: dict[tuple[str, bool], Site] = {}
        routes: dict[str, Route] = {}
        unused = []
        sites: list[Site] = []
        for name in self.names.values():
            uses = self.three.uses[name]
            if not uses:
                unused.append(name)
                routes[name] = Route(name, "zero", "", "the forward pass does not use it")
                continue
            site, reason = None, "its rule disagreed with autograd on this model"
            if name in forced:
                site = self._with_fallback({0}, name)
            elif len(uses) > 1:
                reason = "it is used by more than one module call; its gradients add up before the norm"
            else:
                site, reason = self._with_rule(self.three.calls[next(iter(uses))], name)
            if site is None and name not in forced:
                site = self._broadcast(name) if speculate else None
            if site is None:
                site = self._with_fallback(uses, name)
            if site.rank:
                sites.append(site)
                routes[name] = Route(name, "broadcast", site.path, reason)
                continue
            key = (site.path, site.rule is None)
            if key in single:
                known = single[key]
                site = _merged(known, site)
            single[key] = site
            route = site.rule.name if site.rule is not None else "fallback"
            routes[name] = Route(name, route, site.path, "" if site.rule is not None else reason)
        sites += self._outermost([_loop(site, loops) for site in single.values()], routes)
        elements = sum(math.prod(s) for s in self.three.calls[0].inputs if s is not None)
        return Plan(
            tuple(self.names.values()), sites, routes, self.three.bytes / max(1, elements), tuple(unused)
        )

    @staticmethod
    def _outermost(sites: list[Site], routes: dict[str, Route]) -> list[Site]:
        """Serve nested fallbacks by the outermost: it computes the inner ones again anyway."""
        kept: list[Site] = []
        for site in sorted(sites, key=lambda s: (s.rule is not None, len(s.path))):
            if site.rule is None:
                outer = next(
                    (
                        k
                        for k in kept
                        if k.rule is None and (not k.path or site.path.startswith(k.path + "."))
                    ),
                    None,
                )
                if outer is not None:
                    kept[kept.index(outer)] = _merged(outer, site)
                    for name in site.parameters:
                        routes[name] = Route(name, "fallback", outer.path, routes[name].reason)
                    continue
            kept.append(site)
        return kept


def _merged(site: Site, other: Site) -> Site:
    return Site(
        site.path,
        site.rule,
        site.parameters + other.parameters,
        site.local + other.local,
        site.layout,
        site.batched,
        site.vectorize and other.vectorize,
    )


def _loop(site: Site, loops: frozenset[str]) -> Site:
    if site.rule is None and site.path in loops:
        return Site(site.path, None, site.parameters, site.local, site.layout, site.batched, False)
    return site
