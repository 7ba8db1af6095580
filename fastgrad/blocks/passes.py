"""One run of a network over a batch, from which every block takes what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgrad.batches import logits_of
from fastgrad.blocks.signals import Signal
from fastgrad.blocks.subject import Subject
from fastgrad.engine.backward import gather, send_back
from fastgrad.engine.network import Network
from fastgrad.engine.planning import Plan
from fastgrad.engine.run import Run
from fastgrad.engine.sites import Reading, Site

if TYPE_CHECKING:
    from fastgrad.blocks.block import Block


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
    """A forward pass with what the given blocks read in it.

    Args:
        network: The network.
        plan: How the norms of parameters are found; None where no block asks for them.
        subject: What is known of the network and its inputs.
        blocks: All blocks that will take their values.
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
        blocks: Sequence[Block],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: int,
        *,
        log: bool,
    ) -> None:
        self.network, self.plan, self.subject, self.log = network, plan, subject, log
        self.args, self.kwargs, self.samples = args, kwargs, samples
        mask = kwargs[subject.mask] if subject.mask is not None else None
        self._readings: dict[str, tuple[Reading, ...]] = {b.name: b.readings(subject, mask) for b in blocks}
        self._sites: dict[str, tuple[Site, ...]] = {b.name: b.sites(subject) for b in blocks}
        self._signals: dict[str, tuple[Signal, ...]] = {b.name: b.signals(subject) for b in blocks}
        self._parameters = {b.name for b in blocks if b.parameters}
        self._left = {signals for signals in self._signals.values() if signals}
        self._sent: dict[tuple[Signal, ...], tuple[Tensor, dict[int, Tensor]]] = {}
        self.run = Run(samples)
        sites = [site for own in self._sites.values() for site in own]
        readings = [reading for own in self._readings.values() for reading in own]
        with torch.set_grad_enabled(bool(self._left)):
            output = network.forward(plan, self.run, args, kwargs, sites=sites, readings=readings)
        self._output = logits_of(output)
        #: ``(B, N)``.
        self.logits = self._output.detach()

    def readings(self, block: Block) -> list[Tensor]:
        """What a block's readings saw, in its order."""
        return [self.run.readings[reading] for reading in self._readings[block.name]]

    def back(self, block: Block) -> Back:
        """What the backward pass of a block's signals left for it."""
        signals = self._signals[block.name]
        if signals not in self._sent:
            self._sent[signals] = self._send(signals)
        scale, found = self._sent[signals]
        probes = {id(site): probe for site, probe in self.run.probes}
        at = [found[id(probes[id(site)])] for site in self._sites[block.name]]
        norms = None
        if block.name in self._parameters:
            assert self.plan is not None  # made because this block asks for it
            own = [(site, probe) for site, probe in self.run.probes if site.parameters]
            values = [found[id(probe)] for _, probe in own]
            norms = gather(own, values, self.plan.names, scale, self.samples)
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
        asking = [name for name, own in self._signals.items() if own == signals]
        wanted = {id(site) for name in asking for site in self._sites[name]}
        everything = any(name in self._parameters for name in asking)
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
            found = send_back(self.run, self._output, unit, probes, keep=bool(self._left))
        return scale, {id(probe): value for (_, probe), value in zip(probes, found, strict=True)}
