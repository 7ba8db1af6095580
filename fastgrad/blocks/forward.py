"""One forward pass of the network, from which all blocks are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgrad.batches import class_logits, logits_of
from fastgrad.blocks.subject import Subject
from fastgrad.evaluation import Evaluated, Hook


@dataclass(frozen=True)
class Reading:
    """What a module saw in the forward pass of a batch, in the order of the logits' rows.

    If a module is called several times, the last call counts.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        function: ``(inputs, output) -> (B, ...)``, without gradients, called right after the module has run; positional
            inputs come before those given by keyword.
        copied: Whether the result may share memory with what the module saw, which the network may overwrite.
    """

    path: str
    function: Callable[[tuple[Any, ...], Any], Tensor]
    copied: bool = True


class Pass:
    """A forward pass of B ``samples``, and what it read for each block, by the block's name.

    ``log`` says whether squared norms are wanted as logarithms; ``kept`` is what blocks keep between calls.
    """

    def __init__(
        self, model: nn.Module, readings: Mapping[str, Sequence[Reading]], subject: Subject, args: Any, kwargs: Any,
        samples: int, *, log: bool, kept: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.subject, self.log, self.kept = model, subject, log, kept
        self.args, self.kwargs, self.samples = args, kwargs, samples
        self._network, self._readings = Evaluated(model), readings
        self._values: dict[Reading, Tensor] = {}
        every = [reading for each in readings.values() for reading in each]
        hooks = [(self._network.model.get_submodule(reading.path), self._hook(reading)) for reading in every]
        #: ``(B, N)``.
        self.logits = class_logits(self._network.run(args, kwargs, hooks), samples)
        for reading in every:
            if reading not in self._values:
                raise RuntimeError(f"the forward pass did not call {reading.path!r}, which was to be read")

    def _hook(self, reading: Reading) -> Hook:
        def read(inputs: tuple[Any, ...], output: Any) -> None:
            value = reading.function(inputs, output)
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.samples:
                was = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the reading of {reading.path!r} must be a tensor with one row for each of {self.samples} "
                    f"samples; it was {was}"
                )
            self._values[reading] = value.detach().clone() if reading.copied else value

        return read

    def readings(self, name: str) -> list[Tensor]:
        """Return what a block's readings saw, in the block's order."""
        return [self._values[reading] for reading in self._readings[name]]

    def image(self) -> Tensor:
        """Return the one image tensor among the inputs."""
        place = self.subject.image
        assert place is not None  # or the block would have refused
        image: Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return image

    def again(self, image: Tensor) -> Tensor:
        """Return logits ``(B, N)`` of the same batch with another image, from one more forward pass."""
        place = self.subject.image
        args = tuple(image if i == place else value for i, value in enumerate(self.args))
        kwargs = {name: image if name == place else value for name, value in self.kwargs.items()}
        return logits_of(self._network.run(args, kwargs))
