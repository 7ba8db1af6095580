"""One run of a network over a batch, from which every block takes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.batches import logits_of
from fastgrad.blocks.subject import Subject
from fastgrad.engine.backward import backward_signals, order_by_parameter
from fastgrad.engine.network import Network
from fastgrad.engine.planning import Plan
from fastgrad.engine.run import Reading, Run, Site


@dataclass(frozen=True)
class Signal:
    """What is sent back through a network: one gradient at the logits.

    Attributes:
        name: What it is called in reports and files.
        delta: ``logits (B, N) -> (B, N)``.
    """

    name: str
    delta: Callable[[Tensor], Tensor]


class Wants(NamedTuple):
    """What a block needs of a pass.

    Attributes:
        readings: What to keep of what modules see.
        sites: What to read in the backward pass of its signals.
        signals: What to send back.
        parameters: Whether the squared norms of all parameters' gradients are wanted of that pass as well.
    """

    readings: tuple[Reading, ...] = ()
    sites: tuple[Site, ...] = ()
    signals: tuple[Signal, ...] = ()
    parameters: bool = False


@dataclass(frozen=True)
class Back:
    """What one batched backward pass of S signals left.

    Attributes:
        sites: ``(S, B, m)`` of each site of the block that asked, in its order.
        parameters: Squared norms of every parameter ``(S, B, P)``, where the block asked for them.
        scale: ``(S, B, 1)``: what went back was a signal divided by it, so that squares stay in range.
        log: Whether squared norms are given as logarithms.
    """

    sites: list[Tensor]
    parameters: Tensor | None
    scale: Tensor
    log: bool

    def squared(self, norms: Tensor) -> Tensor:
        """Squared norms ``(S, B, P)`` of the signals themselves, or their logarithms, as ``(B, S, P)``."""
        scale = self.scale.to(norms.dtype)
        if self.log:
            norms = norms.clamp_min(torch.finfo(norms.dtype).tiny).log() + 2 * scale.log()
        else:
            norms = norms * scale.square()
        return norms.movedim(0, 1)


class Pass:
    """A forward pass with what blocks want to read in it.

    Args:
        network: The network.
        plan: How the norms of parameters are found; None where no block asks for them.
        subject: What is known of the network and its inputs.
        wants: What every block that will take its values needs, by name.
        args: The batch, positional.
        kwargs: The batch, by keyword.
        samples: B.
        log: Whether squared norms are to be given as logarithms.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan | None,
        subject: Subject,
        wants: Mapping[str, Wants],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: int,
        *,
        log: bool,
    ) -> None:
        self.network, self.plan, self.subject, self.log = network, plan, subject, log
        self.args, self.kwargs, self.samples = args, kwargs, samples
        self.wants = wants
        self._left = {own.signals for own in wants.values() if own.signals}
        self._sent: dict[tuple[Signal, ...], tuple[Tensor, dict[int, Tensor]]] = {}
        self.run = Run(samples)
        sites = [site for own in wants.values() for site in own.sites]
        readings = [reading for own in wants.values() for reading in own.readings]
        with torch.set_grad_enabled(bool(self._left)):
            output = network.forward(plan, self.run, args, kwargs, sites=sites, readings=readings)
        self._output = logits_of(output)
        #: ``(B, N)``.
        self.logits = self._output.detach()

    def readings(self, name: str) -> list[Tensor]:
        """What a block's readings saw, in its order."""
        return [self.run.readings[reading] for reading in self.wants[name].readings]

    def back(self, name: str) -> Back:
        """What the backward pass of a block's signals left for it."""
        own = self.wants[name]
        if own.signals not in self._sent:
            self._sent[own.signals] = self._send(own.signals)
        scale, found = self._sent[own.signals]
        probes = {id(site): probe for site, probe in self.run.probes}
        at = [found[id(probes[id(site)])] for site in own.sites]
        norms = None
        if own.parameters:
            assert self.plan is not None  # made because this block asks for it
            planned = [(site, probe) for site, probe in self.run.probes if site.parameters]
            values = [found[id(probe)] for _, probe in planned]
            norms = order_by_parameter(planned, values, self.plan.names, scale, self.samples)
        return Back(at, norms, scale, self.log)

    def image(self) -> Tensor:
        """The one image tensor among the inputs."""
        place = self.subject.image
        assert place is not None  # the block's refusal said so
        image: Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return image

    def again(self, image: Tensor) -> Tensor:
        """Logits ``(B, N)`` of the same batch with another image."""
        place = self.subject.image
        args = tuple(image if i == place else value for i, value in enumerate(self.args))
        kwargs = {name: image if name == place else value for name, value in self.kwargs.items()}
        with torch.no_grad():
            return logits_of(self.network.forward(None, Run(self.samples), args, kwargs)).detach()

    def _send(self, signals: tuple[Signal, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """Send signals back; their scale, and the gradient of every probe that a block with them asks for."""
        asking = [own for own in self.wants.values() if own.signals == signals]
        wanted = {id(site) for own in asking for site in own.sites}
        everything = any(own.parameters for own in asking)
        probes = [
            (site, probe)
            for site, probe in self.run.probes
            if id(site) in wanted or (everything and site.parameters)
        ]
        delta = torch.stack([signal.delta(self.logits) for signal in signals])
        # The backward pass is linear in delta: one of unit size keeps every intermediate square in range.
        scale = delta.abs().amax(-1, keepdim=True)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self._left.discard(signals)
        with torch.enable_grad():
            unit = (delta / scale).to(self._output.dtype)
            found = backward_signals(self.run, self._output, unit, probes, keep=bool(self._left))
        return scale, {id(probe): value for (_, probe), value in zip(probes, found, strict=True)}
