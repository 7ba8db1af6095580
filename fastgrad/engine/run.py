"""One forward pass: the places where numbers leave it, and what they left: probes for the backward pass, readings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.engine.shadow import Shadow, attach
from fastgrad.losses import compute_dtype


class Run:
    """The probes and readings of one forward pass.

    Args:
        samples: B.
        impl: What the rules' operators run on.
    """

    def __init__(self, samples: int, impl: str = "auto") -> None:
        self.samples, self.impl = samples, impl
        #: Site and probe, in the order in which the forward pass reached them.
        self.probes: list[tuple[Site, Tensor]] = []
        self.readings: dict[Reading, Tensor] = {}

    def probe(self, site: Site, output: Tensor, columns: int | None = None) -> Tensor:
        """A new probe of a site.

        Args:
            site: The site.
            output: Tensor that gives device and dtype.
            columns: m; by default one for each of the site's parameters.

        Returns:
            Zeros ``(B, m)``, float32 (float64 for a float64 output), that require gradients.
        """
        width = len(site.parameters) if columns is None else columns
        dtype = compute_dtype(output.dtype)
        probe = torch.zeros(self.samples, width, dtype=dtype, device=output.device, requires_grad=True)
        self.probes.append((site, probe))
        return probe


def random_states(module: nn.Module) -> list[Tensor]:
    """The states of the generators that ``module`` may draw from: the CPU's and those of its parameters' devices."""
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in _devices(module))]


def set_random_states(module: nn.Module, states: list[Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    for device, state in zip(_devices(module), states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


def _devices(module: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}, key=str)


@dataclass(frozen=True)
class Site:
    """One place where numbers leave the backward pass: as the gradient of a probe, see `fastgrad.engine.tap`.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        parameters: Names within the model, one for each column of the probe's gradient; empty for a site that
            serves no parameter.
    """

    path: str
    parameters: tuple[str, ...]

    def attach(self, run: Run, shadow: Shadow) -> None:
        """Have the forward pass of ``shadow`` register this site's probe with ``run``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reading:
    """What a module saw in the forward pass of a batch, in the order of the logits' rows.

    ``function`` is called right after the module has run, while its output is in cache. Only the batch itself
    counts: trials and replays are read by nobody. Of several calls of the module the last one counts.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        function: ``(inputs, output) -> (B, ...)``, without gradients; positional inputs come before those given
            by keyword.
        copied: Whether the result may share memory with what the module saw, which the network may overwrite.
    """

    path: str
    function: Callable[[tuple[Any, ...], Any], Tensor]
    copied: bool = True

    def attach(self, run: Run, shadow: Shadow) -> None:
        """Have the forward pass of ``shadow`` add this reading to those of ``run``."""

        def read(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # As few operations as can be: the samples of a small batch are read layer by layer, in a cold cache.
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                value = self.function((*args, *kwargs.values()), output)
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != run.samples:
                was = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the reading of {self.path!r} must be a tensor with one row for each of {run.samples} "
                    f"samples; it was {was}"
                )
            run.readings[self] = value.detach().clone() if self.copied else value

        attach(shadow.submodule(self.path), read)
