"""One run of a network over a batch, from which every block takes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.batches import logits_of
from fastgrad.blocks.subject import Subject
from fastgrad.engine.backward import signal_sqnorms
from fastgrad.engine.network import Network
from fastgrad.engine.plan import Plan
from fastgrad.engine.run import Reading, Run

#: What is sent back through a network: from logits ``(B, N)`` one gradient at them ``(B, N)``.
Signal = Callable[[Tensor], Tensor]


class Pass:
    """A forward pass with what blocks want to read in it.

    Args:
        network: The network.
        plan: How the norms of parameters are found; None where no block asks for them.
        subject: What is known of the network and its inputs.
        readings: What to keep of what modules see, by the name of the block that reads it.
        signals: What to send back for it.
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
        readings: Mapping[str, tuple[Reading, ...]],
        signals: Mapping[str, tuple[Signal, ...]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: int,
        *,
        log: bool,
    ) -> None:
        self.network, self.plan, self.subject, self.log = network, plan, subject, log
        self.args, self.kwargs, self.samples = args, kwargs, samples
        self._readings, self._signals = readings, signals
        self._left = [own for own in signals.values() if own]
        self.run = Run(samples)
        with torch.set_grad_enabled(bool(self._left)):
            every = [reading for own in readings.values() for reading in own]
            output = network.forward(plan, self.run, args, kwargs, readings=every)
        self._output = logits_of(output)
        #: ``(B, N)``.
        self.logits = self._output.detach()

    def readings(self, name: str) -> list[Tensor]:
        """What a block's readings saw, in its order."""
        return [self.run.readings[reading] for reading in self._readings[name]]

    def squared_norms(self, name: str) -> Tensor:
        """Squared norms of every parameter's gradient ``(B, S, P)`` for a block's S signals, or their logarithms."""
        assert self.plan is not None  # made because this block has signals
        signals = self._signals[name]
        self._left.remove(signals)
        logits = self.logits.double() if self.log else self.logits
        delta = torch.stack([signal(logits) for signal in signals])
        names, keep = self.plan.names, bool(self._left)
        return signal_sqnorms(self.run, self._output, delta, names, log=self.log, keep=keep).movedim(0, 1)

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
