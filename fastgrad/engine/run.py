"""One forward pass: the sites of its probes, what they and readings collect, and whether it kept to its plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgrad._torch import next_number, own_parametrizations, pytree, saves_elsewhere
from fastgrad.engine.copy import Settings, Shadow, detach_plain
from fastgrad.engine.hooks import attach
from fastgrad.engine.layout import Layout
from fastgrad.engine.probe import tap
from fastgrad.engine.state import Repeatable, Unchanged, apart
from fastgrad.engine.steps import Steps
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule, ReplayRule
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import bind_contextvar, implementation

if TYPE_CHECKING:
    from fastgrad.engine.plan import Plan


#: ``(args, kwargs, output gradients) -> (B, m)`` squared norms of a module computed again.
Replay = Callable[[Any, Any, Sequence[Tensor]], Tensor]


class OffPlanError(Exception):
    """A forward pass uses parameters in a way unknown to its plan. Arguments: what it does, and the parameters."""


class Run:
    """The probes and readings of one forward pass of B ``samples``; ``impl`` is what the rules' operators run on."""

    def __init__(self, samples: int, impl: str = "auto") -> None:
        self.samples, self.impl = samples, impl
        self.begin(None)

    def begin(self, plan: Plan | None) -> None:
        """Begin a forward pass, or begin it again, by ``plan``."""
        #: The sequence number of its first operation in autograd's graph.
        self.first = next_number()
        #: Site and probe, in the order in which the forward pass reached them.
        self.probes: list[tuple[Site, Tensor]] = []
        self.readings: dict[Reading, Tensor] = {}
        #: The plan that the forward pass kept to; None for a pass without one.
        self.plan = plan
        #: Whether gradients must go back one by one, because saved tensors go through hooks, as in a checkpoint.
        self.one_by_one = False
        #: Why the forward pass left its plan.
        self.left: OffPlanError | None = None
        #: Whether the forward pass is over.
        self.closed = False
        #: Where the path is noted.
        self.steps: Steps | None = None

    def probe(self, site: Site, output: Tensor) -> Tensor:
        """Return a site's new probe: zeros ``(B, m)`` for m parameters, float32 (float64 for a float64 ``output``)."""
        if self.steps is not None:
            self.steps.note(type(site).__name__, site.path, site.parameters)
        dtype = compute_dtype(output.dtype)
        self.one_by_one = self.one_by_one or saves_elsewhere()
        probe = torch.zeros(self.samples, len(site.parameters), dtype=dtype, device=output.device, requires_grad=True)
        if not self.closed:  # else a checkpoint computes a part again
            self.probes.append((site, probe))
        return probe


@dataclass(frozen=True)
class Site:
    """One place where squared norms leave the backward pass as the gradient of a probe (`fastgrad.engine.probe`)."""

    path: str  # the module's name within the model (empty for the model itself)
    parameters: tuple[str, ...]  # names within the model, one for each column of the probe's gradient

    def attach(self, run: Run, shadow: Shadow) -> None:
        """Have calls of ``shadow``'s modules register this site's probe with ``run``; by default none does."""


@dataclass(frozen=True)
class RuledSite(Site):
    """A layer with a rule."""

    local: Mapping[str, str]  # the rule's names of all the module's parameters, by their names in the model
    layout: Layout  # where the batch lies in the layer's input and first output
    rule: LayerRule | ReplayRule

    def require_layout(self, run: Run, output: Tensor) -> None:
        """Raise OffPlanError if the batch is not where the plan has it."""
        if not self.layout.holds(output, run.samples):
            # Noted, because the model may catch the error.
            reason = f"gives {self.path!r} inputs with the batch in another place than before"
            run.left = OffPlanError(reason, self.parameters)
            raise run.left

    def norms(self, run: Run, *given: Any) -> Tensor:
        """Return the squared norms ``(B, m)`` that the rule computes."""
        with bind_contextvar(implementation, run.impl), own_parametrizations():
            norms = self.rule.function(*given)
        return torch.stack([norms[self.local[name]] for name in self.parameters], 1)


@dataclass(frozen=True)
class LayerSite(RuledSite):
    """A layer whose rule needs its input and the gradient of its output."""

    rule: LayerRule

    def attach(self, run: Run, shadow: Shadow) -> None:
        attach(shadow.submodule(self.path), functools.partial(self._tap, run))

    def _tap(self, run: Run, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        value = args[0] if args else next(iter(kwargs.values()))
        self.require_layout(run, output)
        single = self.layout.kind == "single"
        if single:
            output = output.expand(run.samples, *output.shape[1:])
        held = Unchanged(self.path, module)

        def norms(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
            held.require()
            a, g = (self.layout.batch_first(x[0], run.samples) for x in (saved, gradients))
            return self.norms(run, module, a, g)

        in_place = self.rule.in_place and not single
        return tap([output], [value], run.probe(self, output), norms, in_place=in_place)[0]


@dataclass(frozen=True)
class BroadcastSite(Site):
    """A parameter that is only broadcast over the batch: one copy per sample has each sample's own gradient."""

    rank: int  # the number of dimensions that the copies are given

    def spread(self, run: Run, value: Tensor) -> Tensor:
        """Return the copies of ``value``, which stand in for the parameter."""
        shape = (1,) * (self.rank - value.dim()) + tuple(value.shape)
        copies = value.reshape(shape).expand(run.samples, *shape[1:])
        return tap([copies], [], run.probe(self, copies), functools.partial(_squares, run), in_place=False)[0]


def _squares(run: Run, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    # ``run`` is bound here so that it lives as long as the graph.
    (g,) = upcast(gradients[0])
    return sqnorm(g).unsqueeze(1)


@dataclass(frozen=True)
class RecomputedSite(Site):
    """A module that the backward pass computes once more, because its parameters act in the middle of what it does.

    In training mode both must give the same, see `fastgrad.engine.state.NotRepeatableError`.
    """

    def attach(self, run: Run, shadow: Shadow) -> None:
        copy, original = shadow.submodule(self.path), shadow.model.get_submodule(self.path)
        trains = shadow.training and any(m.training for m in copy.modules())
        # For each call under way, its inputs and whatever else computing it again depends on.
        begun: list[tuple[list[Any], Any, Settings, Repeatable | None]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            # Copied, because the module may overwrite its inputs or change its settings, as a counter of calls.
            leaves, spec = pytree.tree_flatten((args, kwargs))
            leaves = [_kept(t.detach()) if isinstance(t, Tensor) else apart(t, detach_plain) for t in leaves]
            begun.append((leaves, spec, shadow.settings(original), Repeatable(copy) if trains else None))

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            leaves, spec, settings, state = begun.pop()
            if state is not None:
                state.require(self.path or type(copy).__name__)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            saved = [leaves[i] for i in places]
            # The tap's node keeps the tensors; a second reference would hide that they were modified.
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs, out_spec = pytree.tree_flatten(output)
            taken = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
            replay = self._replay(run, shadow, [outputs[i].detach() for i in taken], settings)
            held = [Unchanged(path, part) for path, part in original.named_modules(prefix=self.path)]

            def norms(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
                for one in held:
                    one.require()
                filled = list(rest)
                for place, tensor in zip(places, saved, strict=True):
                    filled[place] = tensor
                args, kwargs = pytree.tree_unflatten(filled, spec)
                return replay(args, kwargs, gradients)

            probe = run.probe(self, outputs[taken[0]])
            passed = tap([outputs[i] for i in taken], saved, probe, norms, in_place=False)
            for place, tensor in zip(taken, passed, strict=True):
                outputs[place] = tensor
            return pytree.tree_unflatten(outputs, out_spec)

        attach(copy, before, before=True)
        attach(copy, after)

    def _replay(self, run: Run, shadow: Shadow, outputs: list[Tensor], settings: Settings) -> Replay:
        """Return what the backward pass runs; the module had these ``settings`` before it computed ``outputs``."""
        raise NotImplementedError


def _kept(x: Tensor) -> Tensor:
    """Return a copy with channels first: vmap needs it, and so do some kernels if an input needs no gradient."""
    return x.clone(memory_format=torch.contiguous_format if x.layout == torch.strided else torch.preserve_format)


@dataclass(frozen=True)
class ReplaySite(RecomputedSite, RuledSite):
    """A layer with a replay rule (attention, recurrent)."""

    rule: ReplayRule

    def _replay(self, run: Run, shadow: Shadow, outputs: list[Tensor], settings: Settings) -> Replay:
        self.require_layout(run, outputs[0])
        return functools.partial(self.norms, run, shadow.submodule(self.path))


@dataclass(frozen=True)
class Reading:
    """What a module saw in the forward pass of a batch, in the order of the logits' rows.

    Trials and replays are never read. If a module is called several times, the last call counts.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        function: ``(inputs, output) -> (B, ...)``, without gradients, called right after the module has run; positional
            inputs come before those given by keyword.
        copied: Whether the result may share memory with what the module saw, which the network may overwrite.
    """

    path: str
    function: Callable[[tuple[Any, ...], Any], Tensor]
    copied: bool = True

    def attach(self, run: Run, shadow: Shadow) -> None:

        def read(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                value = self.function((*args, *kwargs.values()), output)
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != run.samples:
                was = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the reading of {self.path!r} must be a tensor with one row for each of {run.samples} "
                    f"samples; it was {was}"
                )
            run.readings[self] = value.detach().clone() if self.copied else value

        attach(shadow.submodule(self.path), read)
