"""Modules that the backward pass computes once more, because their parameters act in the middle of what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.engine.copy import Settings, Shadow, attach, detach_plain
from fastgrad.engine.fallback import Fallback, batch_first
from fastgrad.engine.given import apart
from fastgrad.engine.probe import tap
from fastgrad.engine.run import Run, Site
from fastgrad.engine.sites import RuledSite, columns
from fastgrad.engine.state import Repeatable, Unchanged
from fastgrad.engine.tracing import is_fixed
from fastgrad.layers.registry import ReplayRule
from fastgrad.ops.dispatch import bind_contextvar, implementation

#: ``(args, kwargs, output gradients) -> (B, m)`` of a module computed again.
Replay = Callable[[Any, Any, Sequence[Tensor]], Tensor]


class _Begun(NamedTuple):
    """A call of a module that has begun: copies of its inputs, and what else computing it again depends on."""

    leaves: list[Any]
    spec: Any
    settings: Settings
    state: Repeatable | None


@dataclass(frozen=True)
class RecomputedSite(Site):
    """A module that the backward pass computes once more, from its recorded inputs.

    In training mode that must give the same again, see `fastgrad.engine.state.NotRepeatableError`.
    """

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""
        copy, original = shadow.submodule(self.path), shadow.model.get_submodule(self.path)
        trains = shadow.training and any(m.training for m in copy.modules())
        calls: list[_Begun] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            # Copied: the module may overwrite its inputs, and change its settings, as a counter of calls.
            leaves, spec = pytree.tree_flatten((args, kwargs))
            leaves = [t.detach().clone() if isinstance(t, Tensor) else apart(t, detach_plain) for t in leaves]
            calls.append(_Begun(leaves, spec, shadow.settings(original), Repeatable(copy) if trains else None))

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            run.reach(self)
            leaves, spec, settings, state = calls.pop()
            if state is not None:
                state.require(self.path or type(copy).__name__)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            saved = [leaves[i] for i in places]
            # The tap's node keeps the tensors; a second reference would hide that they were modified.
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs, out_spec = pytree.tree_flatten(output)
            taken = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
            replay = self._replay(run, shadow, [outputs[i].detach() for i in taken], settings)
            held = Unchanged()
            for name, part in original.named_modules():
                held.hold(f"{self.path}.{name}".strip("."), part)

            def norms(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
                held.require()
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
        """What the backward pass does, made when the module, of these ``settings`` before, has computed ``outputs``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReplaySite(RecomputedSite, RuledSite):
    """A layer with a replay rule (attention, recurrent).

    Attributes:
        rule: The rule.
    """

    rule: ReplayRule

    def _replay(self, run: Run, shadow: Shadow, outputs: list[Tensor], settings: Settings) -> Replay:
        self.require_layout(run, outputs[0])
        module = shadow.submodule(self.path)

        def replay(args: Any, kwargs: Any, gradients: Sequence[Tensor]) -> Tensor:
            with bind_contextvar(implementation, run.impl):
                return columns(self.rule.function(module, args, kwargs, gradients), self.local)

        return replay


@dataclass(frozen=True)
class FallbackSite(RecomputedSite):
    """A module of any kind; its attributes are those of `fastgrad.engine.fallback.Fallback`."""

    batched: tuple[bool, ...]
    places: tuple[int, ...]
    vectorize: bool
    verify: bool

    def _replay(self, run: Run, shadow: Shadow, outputs: list[Tensor], settings: Settings) -> Replay:
        device = outputs[0].device.type
        # The user's module rather than its copy, whose hooks belong to this forward pass.
        module = shadow.model.get_submodule(self.path)
        parameters = [shadow.model.get_parameter(name) for name in self.parameters]
        fallback = Fallback(
            module,
            parameters,
            self.batched,
            batch_first(outputs, self.places),
            self.places,
            settings,
            self.path,
            self.vectorize,
            self.verify,
            shadow.training,
            shadow.recorded,
        )
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else torch.bfloat16

        def replay(args: Any, kwargs: Any, gradients: Sequence[Tensor]) -> Tensor:
            fixed_before = is_fixed(run.samples)
            with torch.autocast(device, dtype, enabled, cache_enabled=False):
                norms = fallback.sqnorms(args, kwargs, batch_first(gradients, self.places), run.samples)
            if is_fixed(run.samples) and not fixed_before:
                raise RuntimeError(
                    f"layer {self.path!r} ({type(module).__name__}) has no rule of its own and is run again for each "
                    "sample, in operations whose computation depends on the batch size, so its gradients have no graph "
                    "of dynamic batch. Register a rule (fastgrad.layers.register_rule) or leave out what reads its "
                    "gradients; a .pt2 can be exported with one_by_one=True"
                )
            return norms

        return replay
