"""Signed gradients of the biases of normalisation layers: one backward pass of data, no norm, no weight gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.blocks.activations import CLIP, COMPONENTS, wide_mahalanobis
from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.channels import Channels, output_of
from fastgrad.blocks.passes import Pass, Signal
from fastgrad.blocks.subject import Subject
from fastgrad.engine.run import Run, Site
from fastgrad.engine.shadow import Shadow, attach
from fastgrad.engine.sites import bypassable
from fastgrad.engine.tap import tap
from fastgrad.layers.registry import LayerRule, find_rule
from fastgrad.ops.channel_moments import channel_sums
from fastgrad.scores.rows import Rows

#: A backward pass of data does a forward pass's products, and reads what that one wrote.
_BACKWARD = 1.3


def _predicted(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)


#: The predicted logit itself, whatever its probability: a gradient that does not vanish with confidence.
PREDICTED_LOGIT = Signal("predicted logit", _predicted)


@dataclass(frozen=True)
class ChannelSums(Site):
    """A place whose output's gradient is summed, ``sum_t g_bct``, when the backward pass comes by.

    Attributes:
        place: Where the channels lie.
    """

    place: Channels

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""
        attach(shadow.submodule(self.path), functools.partial(self._tap, run))

    def _sums(self, _: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        return channel_sums(gradients[0], self.place.dim)

    def _tap(self, run: Run, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = output_of(output)
        assert value is not None  # the place was found by it
        found, _ = find_rule(module)
        rule = found if isinstance(found, LayerRule) else None
        probe = run.probe(self, value, self.place.count)
        given = args[0] if args else next(iter(kwargs.values()), None)
        saved = [given] if isinstance(given, Tensor) and given.is_floating_point() else []
        backward = None
        if (
            rule is not None
            and rule.input_gradient is not None
            and saved
            and bypassable(module, saved[0], value)
        ):
            backward = rule.input_gradient(module, saved[0])
        in_place = rule is not None and rule.in_place
        passed = tap([value], saved, probe, self._sums, in_place=in_place, backward=backward)[0]
        return passed if output is value else _with_first(output, passed)


class BiasGradients(Block):
    """``sum_t g_bct`` of the predicted logit at every place of `fastgrad.blocks.channels`, ``(B, D)``.

    It is the gradient of a normalisation layer's bias, or of the bias that a layer would have, given as
    ``sign(v) sqrt(|v|)``. Channels keep their signs and their places: norms give both away.

    Args:
        depth: Share of the network, counted in operations from its end, that the backward pass goes through.
    """

    name = "bias_gradients"
    alarm = "an answer that rests on unusual parts of the network"
    shapes = "(B, D)"

    def __init__(self, depth: float = 1.0) -> None:
        if not 0 < depth <= 1:
            raise ValueError(f"depth must lie in (0, 1]; it was {depth!r}")
        self.depth = depth

    def options(self) -> dict[str, Any]:
        """The depth."""
        return {"depth": self.depth}

    def places(self, subject: Subject) -> tuple[Channels, ...]:
        """Where channels are read, from the given depth on; the last place in any case."""
        deep = tuple(place for place in subject.channels if place.depth >= 1 - self.depth)
        return deep or subject.channels[-1:]

    def refusal(self, subject: Subject) -> str | None:
        """A network without a layer whose channels could be read."""
        return None if subject.channels else "the network has no normalisation, convolutional or linear layer"

    def price(self, subject: Subject) -> float:
        """The backward pass as far as its first place."""
        return _BACKWARD * (1 - min((place.depth for place in self.places(subject)), default=0.0))

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        """The predicted logit."""
        return (PREDICTED_LOGIT,)

    def sites(self, subject: Subject) -> tuple[ChannelSums, ...]:
        """The places' sums."""
        return tuple(ChannelSums(place.path, (), place) for place in self.places(subject))

    def values(self, found: Pass) -> Tensor:
        """Signed roots side by side, in the order of the forward pass."""
        sums = torch.cat([part[0] for part in found.back(self.name).sites], -1)
        return sums.sign() * sums.abs().sqrt()

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """One distance."""
        yield wide_mahalanobis(cls.name, blocks)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """The leading principal components."""
        return Rows.fit(blocks, cls.name, clip=CLIP, dimensions=COMPONENTS)


def _with_first(output: Any, first: Tensor) -> Any:
    """A module's output of several tensors with the first one replaced."""
    replaced = first if isinstance(output[0], Tensor) else _with_first(output[0], first)
    return type(output)((replaced, *output[1:]))
