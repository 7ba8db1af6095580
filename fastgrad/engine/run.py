"""What one forward pass leaves: probes for the backward pass, and readings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgrad.losses import compute_dtype

if TYPE_CHECKING:
    from fastgrad.engine.sites import Reading, Site


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
