"""One run of a network over a batch, from which every block takes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.batches import logits_of
from fastgrad.blocks.block import Block
from fastgrad.blocks.subject import Subject
from fastgrad.engine.backward import signal_sqnorms
from fastgrad.engine.network import Network
from fastgrad.engine.run import Run

#: What is sent back through a network: from logits ``(B, N)`` one gradient at them ``(B, N)``.
Signal = Callable[[Tensor], Tensor]


class Pass:
    """A forward pass with what blocks want to read in it.

    ``samples`` is B; ``log`` says whether squared norms are to be given as logarithms. ValueError where the mask that
    the inputs of the fit had is missing.
    """

    def __init__(
        self,
        network: Network,
        blocks: Sequence[Block],
        subject: Subject,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: int,
        *,
        log: bool,
    ) -> None:
        if subject.mask is not None and subject.mask not in kwargs:
            raise ValueError(f"inputs must have {subject.mask!r}, as those of fit had")
        mask = None if subject.mask is None else kwargs[subject.mask]
        self.network, self.subject, self.log = network, subject, log
        self.args, self.kwargs, self.samples = args, kwargs, samples
        self._readings = {block.name: block.readings(subject, mask) for block in blocks}
        self._signals = {block.name: block.signals(subject) for block in blocks}
        self._left = [signals for signals in self._signals.values() if signals]
        self.plan = network.plan(args, kwargs, samples) if self._left else None
        self.run = Run(samples)
        with torch.set_grad_enabled(bool(self._left)):
            every = [reading for own in self._readings.values() for reading in own]
            output = network.forward(self.plan, self.run, args, kwargs, readings=every)
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
