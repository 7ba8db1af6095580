"""Choose for each parameter how its squared norms are computed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from fastgrad._torch import is_traced
from fastgrad.engine.fallback import FallbackSite
from fastgrad.engine.layout import Layout
from fastgrad.engine.observe import Observation
from fastgrad.engine.run import BroadcastSite, LayerSite, ReplaySite
from fastgrad.layers.registry import ReplayRule, find_rule

PlannedSite = LayerSite | ReplaySite | FallbackSite | BroadcastSite


@dataclass(frozen=True)
class Route:
    """A parameter's name, its route, the module that uses it, and the reason (`GradientFeatures.report`)."""

    parameter: str
    route: str
    module: str
    reason: str


@dataclass(eq=False)
class Known:
    """What is known of a model for inputs of one structure."""

    training: bool  # whether a module runs in training mode
    names: dict[int, str]  # the wanted parameters, names by id
    # The model's modules: while they live, no others have their ids. Parameters are known by name, because a weak
    # reference would keep torch.utils.swap_tensors from swapping them.
    modules: list[weakref.ref[nn.Module]]
    plans: list[Plan] = field(default_factory=list)  # most recently used first
    counts: bool = True  # whether a pass may change objects in attributes, as lists of logs; the first one shows it


@dataclass(frozen=True)
class Plan:
    """The sites of one model for one structure of inputs, with the reasons for them.

    Attributes:
        sites: The sites that serve the wanted parameters.
        routes: The route of each wanted parameter by name, in order.
        bytes_per_element: Bytes of layer outputs per input element, to estimate memory.
        untracked: Names of wanted parameters that the model used other than through its modules' attributes.
        outputs: Where the batch lies in each tensor of the output whose gradient matters; None where it is not found.
        paths: The paths on which it agreed with autograd, see `fastgrad.engine.steps`.
        zeros: Names of parameters that were zero in the trial, if others that were used had no gradient there.
        carriers: For each leaf of the inputs, whether it carries the batch.
        linear: Whether gradients are in proportion to those of the outputs.
        looped: Whether several gradients must go back one after the other.
    """

    sites: tuple[PlannedSite, ...]
    routes: dict[str, Route]
    bytes_per_element: float = field(compare=False)
    untracked: tuple[str, ...]
    known: Known = field(compare=False, repr=False)
    outputs: tuple[Layout | None, ...] = ()
    paths: set[int] = field(default_factory=set, compare=False, repr=False)
    zeros: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    carriers: tuple[bool, ...] = ()
    linear: bool = True
    looped: bool = False

    def outdated(self, model: nn.Module) -> bool:
        """Whether gradients may flow now that the trial could not see, because a layer had only zeros then."""
        if is_traced() or not self.zeros:
            return False
        return any(bool(p.any()) for name, p in model.named_parameters() if name in self.zeros)

    @property
    def replaces(self) -> bool:
        """Whether the model gets one copy per sample of a parameter or an output, on which it may fail."""
        return any(
            isinstance(site, BroadcastSite) or (isinstance(site, LayerSite) and site.layout.kind == "single")
            for site in self.sites
        )

    def unused(self) -> list[str]:
        """Return names of parameters that no path used so far."""
        return [name for name, route in self.routes.items() if route.route == "zero"]

    def joined(self, other: Plan) -> Plan:
        """Return this plan, with the sites of ``other`` for parameters that are unused in this plan."""
        idle = set(self.unused())
        sites = [
            replace(site, parameters=tuple(name for name in site.parameters if name in idle))
            for site in other.sites
            if not idle.isdisjoint(site.parameters)
        ]
        if not sites:
            return self
        routes = self.routes | {name: other.routes[name] for name in idle}
        return replace(
            self,
            sites=tuple(_outermost([*self.sites, *sites], routes)),
            routes=routes,
            # A path includes the sites that it reaches, so paths of either plan match only with the same sites.
            paths=self.paths | other.paths,
        )


@dataclass(frozen=True)
class PlanConstraints:
    """What a plan has to avoid, because a trial failed."""

    copies: bool = True  # whether parameters that are broadcast, and outputs of one row, may get one copy per sample
    no_vmap: frozenset[str] = frozenset()  # paths of modules which ``vmap`` cannot take
    hooked: frozenset[str] = frozenset()  # paths of modules with hooks of gradients, which ``vmap`` silently skips
    at_root: frozenset[str] = frozenset()  # parameters that must take the fallback at the model itself

    def after_failure(self, plan: Plan) -> PlanConstraints | None:
        """Return what to avoid next, after a trial of ``plan`` failed; None if nothing is left to avoid."""
        if plan.replaces:
            return replace(self, copies=False)
        mapped = {site.path for site in plan.sites if isinstance(site, FallbackSite) and site.vectorize}
        if mapped:
            return replace(self, no_vmap=self.no_vmap | mapped)
        # One sample's rows may be no valid input for a part alone, as with offsets into all rows. An autograd function
        # may fail if parameters need no gradient, unless the whole model is computed again.
        parts = {p for site in plan.sites if isinstance(site, FallbackSite) and site.path for p in site.parameters}
        at_root = self.at_root.union(parts or plan.routes)
        return None if at_root == self.at_root else replace(self, at_root=at_root)


class Planner:
    """Makes the plans of one model from an observation of a few samples and their gradients."""

    def __init__(self, observation: Observation, known: Known) -> None:
        self.seen, self.known, self.names = observation, known, known.names

    def plan(self, constraints: PlanConstraints, names: Iterable[str] | None = None) -> Plan:
        """Choose a route for every wanted parameter, or for those of ``names``; the others count as unused."""
        sites: dict[object, PlannedSite] = {}
        routes: dict[str, Route] = {}
        chosen = set(self.names.values() if names is None else names)
        for name in self.names.values():
            # A parameter that only training mode uses comes to at_root by a trial in that mode.
            if name not in chosen or (not self.seen.uses[name] and name not in constraints.at_root):
                routes[name] = Route(name, "zero", "", "the forward pass does not use it")
                continue
            site, routes[name] = self._choose(name, constraints)
            # One module has one site for all the parameters that it serves in the same way.
            key = name if isinstance(site, BroadcastSite) else (type(site), site.path)
            joined = sites[key].parameters + site.parameters if key in sites else site.parameters
            sites[key] = replace(site, parameters=joined)
        elements = sum(math.prod(shape) for shape in self.seen.calls[0].inputs if shape is not None)
        return Plan(
            tuple(_outermost(list(sites.values()), routes)),
            routes,
            self.seen.bytes / max(1, elements),
            tuple(name for name in self.names.values() if name in self.seen.untracked),
            self.known,
        )

    def _choose(self, name: str, constraints: PlanConstraints) -> tuple[PlannedSite, Route]:
        """Return a site for one parameter, with its layer's rule, a copy per sample or the fallback, and its route."""
        uses = self.seen.uses[name]
        if name in constraints.at_root:
            uses, reason = {0}, "its rule disagreed with autograd on this model, or could not run"
        elif len(uses) > 1:
            reason = "it is used by more than one module call; its gradients add up before the norm"
        else:
            ruled, reason = self._ruled(next(iter(uses)), name, constraints)
            if ruled is not None:
                return ruled, Route(name, ruled.rule.name, ruled.path, "")
        if constraints.copies and name not in constraints.at_root and (copies := self._broadcast(name)):
            return copies, Route(name, "broadcast", copies.path, reason)
        site = self._fallback(uses, name, constraints)
        return site, Route(name, "fallback", site.path, reason)

    def _ruled(self, use: int, name: str, constraints: PlanConstraints) -> tuple[LayerSite | ReplaySite | None, str]:
        """Return a site with the rule of the module that is called, or the reason against it."""
        if use < 0:
            return None, "a hook of the model uses it"
        call = self.seen.calls[use]
        # The copy has the forward method that the user's module has when it is not being recorded.
        rule, reason = find_rule(call.copy)
        if rule is None:
            return None, reason
        children = rule.children if isinstance(rule, ReplayRule) else ()
        local = {self.names[id(p)]: own for own, p in call.module.named_parameters() if id(p) in self.names}
        if local.get(name) not in {*call.module._parameters, *children}:
            return None, f"it is used by {type(call.module).__name__}, whose rule does not know it"
        if not self.seen.once(call):
            return None, "its module is called more than once"
        if call.gathered:
            return None, "its module gets rows that were gathered by an index computed from the batch"
        layouts = self.seen.output_layouts(call)
        layout = layouts[0] if layouts else None
        if layout is None or (len(layouts) > 1 and not isinstance(rule, ReplayRule)):
            return None, "the batch was not found in its module's output"
        if isinstance(rule, ReplayRule):
            place = 0 if getattr(call.module, "batch_first", True) else 1
            if layout != (Layout("moved", place) if place else Layout("plain")):
                return None, f"its module gets the batch in another layout ({layout.kind})"
            return ReplaySite(call.path, (name,), local, layout, rule), ""
        if layout.kind == "single" and not constraints.copies:
            return None, "its module's output does not carry the batch"
        if layout.kind in ("folded", "moved") and not rule.positions:
            return None, f"its module gets the batch in another layout ({layout.kind})"
        return LayerSite(call.path, (name,), local, layout, rule), ""

    def _broadcast(self, name: str) -> BroadcastSite | None:
        """Return a site with one copy per sample of a parameter, if every use broadcasts it over the batch."""
        rank, *others = self.seen.ranks[name] or [None]
        parameter = self.seen.parameters[name]
        if others or rank is None or rank < parameter.dim() or (rank == parameter.dim() and parameter.shape[0] != 1):
            return None
        return BroadcastSite(name.rpartition(".")[0], (name,), rank)

    def _fallback(self, uses: set[int], name: str, constraints: PlanConstraints) -> FallbackSite:
        """Return a site of the innermost module called once that contains all uses and has batched inputs."""
        for call in self.seen.enclosing(uses):
            if not self.seen.once(call) or (call.gathered and call.path):
                continue
            batched = self.seen.batched_leaves(call)
            if batched is None or not any(batched):
                continue
            layouts = self.seen.output_layouts(call)
            # Some outputs may have the batch in another dimension, as states of all steps do.
            places = tuple(x.dim for x in layouts if x is not None and x.kind != "single")
            if layouts and len(places) == len(layouts):
                # A function that vmap cannot take may look at values.
                looks = call.path in constraints.no_vmap
                vectorize, verify = not looks and call.path not in constraints.hooked, looks or self.seen.rows.gathers
                return FallbackSite(call.path, (name,), batched, places, vectorize, verify, call.precision)
        raise ValueError(
            "model must treat the samples of a batch independently, batch in dimension 0 of inputs; no part of it that "
            f"is called once and contains all uses of {name!r} does, with the batch in all its outputs (a loss of all "
            "samples has none)"
        )


def _outermost(sites: list[PlannedSite], routes: dict[str, Route]) -> list[PlannedSite]:
    """Merge nested fallbacks into the outermost, which computes the inner ones again anyway."""
    kept: dict[str, FallbackSite] = {}
    for site in sorted((s for s in sites if isinstance(s, FallbackSite)), key=lambda s: len(s.path)):
        outer = next((k for k in kept.values() if not k.path or site.path.startswith(k.path + ".")), None)
        if outer is None:
            kept[site.path] = site
            continue
        kept[outer.path] = replace(
            outer,
            parameters=outer.parameters + site.parameters,
            vectorize=outer.vectorize and site.vectorize,
            verify=outer.verify or site.verify,
        )
        for name in site.parameters:
            routes[name] = replace(routes[name], module=outer.path)
    # Fallbacks come first, so that a layer's hook runs ahead of theirs on the layer's own output.
    return [*kept.values(), *(site for site in sites if not isinstance(site, FallbackSite))]
