"""One forward pass: the places where numbers leave it, what they left, and whether it kept to its plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgrad._torch import saves_elsewhere
from fastgrad.engine.copy import Shadow, attach
from fastgrad.engine.steps import Steps
from fastgrad.losses import compute_dtype

if TYPE_CHECKING:
    from fastgrad.engine.plan import Plan


class OffPlanError(Exception):
    """A forward pass uses ``parameters`` in a way that its plan does not know."""

    def __init__(self, parameters: tuple[str, ...], reason: str) -> None:
        super().__init__(reason)
        self.parameters, self.reason = parameters, reason


class Run:
    """The probes and readings of one forward pass of B ``samples``; ``impl`` is what the rules' operators run on."""

    def __init__(self, samples: int, impl: str = "auto") -> None:
        self.samples, self.impl = samples, impl
        self.begin(None)

    def begin(self, plan: Plan | None) -> None:
        """Begin a forward pass, or begin it again, by ``plan``."""
        #: Site and probe, in the order in which the forward pass reached them.
        self.probes: list[tuple[Site, Tensor]] = []
        self.readings: dict[Reading, Tensor] = {}
        #: The plan that the forward pass kept to; None for a pass without one.
        self.plan = plan
        #: Whether gradients cannot go back together: a part of it will be computed again to get at what autograd did
        #: not save, or parameters may have another dtype than activations, which batch norm on a CPU then refuses.
        self.one_by_one = False
        #: Why the forward pass left its plan.
        self.left: OffPlanError | None = None
        #: Whether the forward pass is over.
        self.closed = False
        #: Where the path is noted.
        self.steps: Steps | None = None

    def reach(self, site: Site) -> None:
        """Note that the forward pass comes to a site of its plan."""
        if self.steps is not None:
            self.steps.note(type(site).__name__, site.path, site.parameters)

    def probe(self, site: Site, output: Tensor) -> Tensor:
        """A new probe of a site: zeros ``(B, m)`` for m parameters, float32 (float64 for a float64 ``output``)."""
        dtype = compute_dtype(output.dtype)
        reduced = dtype != output.dtype and output.device.type == "cpu"
        self.one_by_one = self.one_by_one or reduced or saves_elsewhere()
        probe = torch.zeros(self.samples, len(site.parameters), dtype=dtype, device=output.device, requires_grad=True)
        if not self.closed:  # else a checkpoint computes a part again
            self.probes.append((site, probe))
        return probe


@dataclass(frozen=True)
class Site:
    """One place where numbers leave the backward pass: as the gradient of a probe, see `fastgrad.engine.probe`.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        parameters: Names within the model, one for each column of the probe's gradient.
    """

    path: str
    parameters: tuple[str, ...]

    def attach(self, run: Run, shadow: Shadow) -> None:
        """Have calls of ``shadow``'s modules register this site's probe with ``run``; by default none does."""


@dataclass(frozen=True)
class Reading:
    """What a module saw in the forward pass of a batch, in the order of the logits' rows.

    Only the batch itself counts: trials and replays are never read. Of several calls of the module the last one counts.

    Attributes:
        path: The module's name within the model (empty for the model itself).
        function: ``(inputs, output) -> (B, ...)``, without gradients, called right after the module has run; positional
            inputs come before those given by keyword.
        copied: Whether the result may share memory with what the module saw, which the network may overwrite.
    """

    path: str
    function: Callable[[tuple[Any, ...], Any], Tensor]
    copied: bool = True

    def attach(self, run: Run, shadow: Shadow) -> None:
        """See `Site`."""

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
