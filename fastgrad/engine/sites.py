"""Places where squared norms leave a network's backward pass: layers with a rule, parameters that are broadcast."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.engine.copy import Shadow, attach
from fastgrad.engine.layout import Layout
from fastgrad.engine.probe import tap
from fastgrad.engine.run import Run, Site
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule
from fastgrad.ops.dispatch import bind_contextvar, implementation


@dataclass(frozen=True)
class RuledSite(Site):
    """A layer with a rule.

    Attributes:
        local: The parameters by the names the rule gives them.
        layout: Where the batch lies in the layer's input and first output.
        rank: The number of dimensions of that output.
    """

    local: tuple[str, ...]
    layout: Layout
    rank: int

    def require_layout(self, run: Run, output: Tensor) -> None:
        """Leave the plan if the batch is not where it was."""
        if output.dim() != self.rank or not self.layout.holds(output, run.samples):
            run.leave_plan(self.parameters, f"gives {self.path!r} inputs with the batch in another place than before")


@dataclass(frozen=True)
class LayerSite(RuledSite):
    """A layer whose rule needs its input and the gradient of its output.

    Attributes:
        rule: The rule.
    """

    rule: LayerRule

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""
        attach(shadow.submodule(self.path), functools.partial(self._tap, run))

    def _tap(self, run: Run, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        value = args[0] if args else next(iter(kwargs.values()))
        run.reach(self)
        self.require_layout(run, output)
        single = self.layout.kind == "single"
        if single:
            output = output.expand(run.samples, *output.shape[1:])
        if not run.closed:
            run.held.hold(self.path, module)
        norms = functools.partial(self._norms, run, module)
        in_place = self.rule.in_place and not single
        return tap([output], [value], run.probe(self, output), norms, in_place=in_place)[0]

    def _norms(self, run: Run, module: nn.Module, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        a = self.layout.batch_first(saved[0], run.samples)
        g = self.layout.batch_first(gradients[0], run.samples)
        with bind_contextvar(implementation, run.impl):
            return columns(self.rule.function(module, a, g), self.local)


@dataclass(frozen=True)
class BroadcastSite(Site):
    """A parameter that is only broadcast over the batch: one copy per sample has each sample's own gradient.

    Attributes:
        rank: The number of dimensions that the copies are given.
    """

    rank: int

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""
        parameter = shadow.model.get_parameter(self.parameters[0])
        value = shadow.tensor(parameter)
        shape = (1,) * (self.rank - value.dim()) + tuple(value.shape)
        copies = value.reshape(shape).expand(run.samples, *shape[1:])
        probe = run.probe(self, copies)
        passed = tap([copies], [], probe, functools.partial(_squares, run), in_place=False)[0]
        shadow.substitute(parameter, passed)


def _squares(run: Run, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    # The pass lives as long as its graph holds this.
    (g,) = upcast(gradients[0])
    return sqnorm(g).unsqueeze(1)


def columns(norms: Mapping[str, Tensor], local: tuple[str, ...]) -> Tensor:
    """A rule's answer as ``(B, m)``."""
    each = [norms[name] for name in local]
    return each[0].unsqueeze(1) if len(each) == 1 else torch.stack(each, 1)
