"""How a block is scored: functions that fit a one-class score on clean blocks, of which a `Block` names some.

Each takes the block's name, clean blocks by name and `Settings`, and returns a `Part`, or None where the block's shape
allows no such score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrad.scores.fitted import Fitted
from fastgrad.scores.gaussian_mixture import GaussianMixture
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.rows import ScoreRows

#: Standardised columns are clipped here, so that no single one decides alone.
CLIP = 8.0
#: Largest numbers of Gaussians in a mixture and of principal components that it sees. AUROC of attacks on a ResNet-20,
#: image statistics and roughness on clean data: eight Gaussians on 16 components .91, one .84, one on 4 components .76.
_COMPONENTS, _DIMENSIONS = 8, 16
#: An energy below this counts as 0: if logits are log probabilities, it is 0 up to rounding.
_NO_ENERGY = 1e-4

#: Name, rows and fitted module of a one-class score; its option ``two_sided=True`` makes low values unusual, too.
Part = tuple[str, ScoreRows, Fitted]


@dataclass(frozen=True)
class Settings:
    """How the scores of one block are fitted."""

    norms: bool  # whether the block holds squared norms
    log: bool  # whether to take the logarithms of squared norms
    count: int  # clean samples of the smallest fit; it gives all fits as many components, so that scores compare

    def rows(self, block: str, blocks: Mapping[str, Tensor], **how: Any) -> ScoreRows:
        """Return the block's standardised columns, for norms of their logarithms; ``how`` goes to `ScoreRows.fit`."""
        return ScoreRows.fit(blocks, block, norms=self.norms, log=self.norms and self.log, **how)


OneClass = Callable[[str, Mapping[str, Tensor], Settings], "Part | None"]


def distance(block: str, blocks: Mapping[str, Tensor], settings: Settings) -> Part:
    """Score by the Mahalanobis distance of the standardised columns, each clipped at `CLIP`."""
    rows = settings.rows(block, blocks, clip=CLIP)
    return f"{block}_distance", rows, Mahalanobis.fit(rows(blocks))


def mixture(block: str, blocks: Mapping[str, Tensor], settings: Settings, **how: Any) -> Part:
    """Score by minus the log density of a Gaussian mixture on principal components."""
    rows = settings.rows(block, blocks, dimensions=min(_DIMENSIONS, max(1, settings.count // 10)), **how)
    values = rows(blocks)
    components = max(1, min(_COMPONENTS, settings.count // (5 * values.shape[1])))
    return f"{block}_mixture", rows, GaussianMixture.fit(values, components)


def plain(block: str, blocks: Mapping[str, Tensor], settings: Settings, **options: Any) -> Part:
    """Score by the block's only column; ``options`` are those of the score, such as ``two_sided=True``."""
    return block, ScoreRows.fit(blocks, block, standardise=False), Plain(**options)


def energy(block: str, blocks: Mapping[str, Tensor], settings: Settings) -> Part:
    """Score logits by their energy, on both sides: an attack may make the network more certain than clean inputs do."""
    return "energy", ScoreRows.fit(blocks, block, standardise=False), Energy(two_sided=True)


def margin(block: str, blocks: Mapping[str, Tensor], settings: Settings) -> Part | None:
    """Score several logits by their margin: an attack that stops at the boundary leaves a small one."""
    if blocks[block].shape[1] < 2:
        return None
    return "margin", ScoreRows.fit(blocks, block, top=2, standardise=False), Margin()


class Plain(Fitted):
    """The only column of a block as its score."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return scores ``(B,)`` of ``rows`` ``(B, 1)``."""
        return rows[:, 0]


class Energy(Fitted):
    """Minus the log-sum-exp of the logits: ``s(z) = -log sum_j exp(z_j)``.

    Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection", 2020.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return scores ``(B,)`` of ``logits`` ``(B, N)``."""
        energy = -torch.logsumexp(logits, -1)
        return energy.masked_fill(energy.abs() < _NO_ENERGY, 0.0)


class Margin(Fitted):
    """Minus the logarithm of the distance between the two highest logits: ``s(z) = -log(z_(1) - z_(2))``.

    Scheffer, Decomain and Wrobel, "Active hidden Markov models for information extraction", 2001, use probabilities;
    on logits it does not saturate. The share of clean inputs within a small distance of 0 is proportional to it. So the
    logarithm has an exponential tail, which p-values follow: DeepFool on EfficientNet-Lite0, AUROC .81 to .90.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return scores ``(B,)`` of the two highest ``logits`` ``(B, 2)``, in descending order."""
        # A distance below rounding means nothing.
        rounding = torch.finfo(torch.float32).eps * logits[:, 0].abs()
        return -torch.log((logits[:, 0] - logits[:, 1]).clamp(min=1e-30) + rounding)
