"""Sites that read the gradient at a layer's output channel by channel, without any parameter's norm."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.blocks.channels import Channels, output_of
from fastgrad.engine.run import Run, Site
from fastgrad.engine.shadow import Shadow, attach
from fastgrad.engine.sites import bypassable
from fastgrad.engine.tap import tap
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule, find_rule
from fastgrad.ops.channel_moments import channel_sums


@dataclass(frozen=True)
class ChannelSite(Site):
    """A place whose output's gradient is read when the backward pass comes by.

    Attributes:
        place: Where the channels lie.
    """

    place: Channels

    @classmethod
    def at(cls, place: Channels) -> Any:
        """The site of a place; it serves no parameter."""
        return cls(place.path, (), place)

    def width(self, module: nn.Module) -> int:
        """Columns of the probe."""
        raise NotImplementedError

    def norms(
        self, module: nn.Module, rule: LayerRule | None, saved: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        """``(B, width)`` from the layer's input and its output's gradient."""
        raise NotImplementedError

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""
        attach(shadow.submodule(self.path), functools.partial(self._tap, run))

    def _tap(self, run: Run, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = output_of(output)
        assert value is not None  # the place was found by it
        found, _ = find_rule(module)
        rule = found if isinstance(found, LayerRule) else None
        probe = run.probe(self, value, self.width(module))
        norms = functools.partial(self.norms, module, rule)
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
        passed = tap([value], saved, probe, norms, in_place=in_place, backward=backward)[0]
        return passed if output is value else _with_first(output, passed)


@dataclass(frozen=True)
class ChannelSums(ChannelSite):
    """``sum_t g_bct`` of every channel, ``(B, C)``: the gradient of the bias that acts there."""

    def width(self, module: nn.Module) -> int:
        """One a channel."""
        return self.place.count

    def norms(
        self, module: nn.Module, rule: LayerRule | None, saved: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        """The sums."""
        return channel_sums(gradients[0], self.place.dim)


@dataclass(frozen=True)
class ChannelNorms(ChannelSite):
    """Squared norms of the bias's gradient, of the output's, and of the scale's where the layer has a rule for it."""

    def width(self, module: nn.Module) -> int:
        """Two or three."""
        found, _ = find_rule(module)
        return 2 + (isinstance(found, LayerRule) and _has_scale(module))

    def norms(
        self, module: nn.Module, rule: LayerRule | None, saved: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        """The norms."""
        (g,) = upcast(gradients[0])
        columns = [sqnorm(channel_sums(g, self.place.dim)), sqnorm(g)]
        if rule is not None and _has_scale(module):
            columns.append(rule.function(module, saved[0], gradients[0])["weight"])
        return torch.stack(columns, -1)


def _has_scale(module: nn.Module) -> bool:
    """Whether the module scales each channel."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _with_first(output: Any, first: Tensor) -> Any:
    """A module's output of several tensors with the first one replaced."""
    inner = output[0] if isinstance(output[0], Tensor) else _with_first(output[0], first)
    replaced = first if isinstance(output[0], Tensor) else inner
    return type(output)((replaced, *output[1:]))
