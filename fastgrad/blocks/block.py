"""The base class of blocks: features that a detector reads from an input, with their price and one-class scores.

A block says which modules of the network it reads; all blocks share one forward pass, and `View` and `Gradients` make
more. A block also says which one-class scores can be fitted on its tensor, and what the challenge classifier sees of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.checks import Array as Array
from fastgrad.scores.fitted import Fitted, FittedList
from fastgrad.scores.gaussian_mixture import GaussianMixture
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.rows import ScoreRows

#: Name of the challenge classifier among the sources of evidence; the other sources are blocks.
CHALLENGE_CLASSIFIER = "challenges"
#: Standardised columns are clipped here, so that no single one decides alone.
CLIP = 8.0
#: Largest numbers of Gaussians in a mixture and of principal components that it sees. AUROC of attacks on a ResNet-20,
#: image statistics and roughness on clean data: eight Gaussians on 16 components .91, one .84, one on 4 components .76.
_COMPONENTS, _DIMENSIONS = 8, 16
#: Principal components of h and of activations that the challenge classifier sees, and the columns beside them: most of
#: what a challenge changes lies in directions in which clean data do not vary. AUROC with and without the columns:
#: EfficientNet-Lite0 .906 and .902 (1,024 columns .903, all 21,008 .906), ResNet-20, attacks after JPEG, .640 and .617.
JOINT = {"dimensions": 64, "extra_columns": 4096}
#: Name, rows and fitted module of a one-class score; its option ``two_sided=True`` makes low values unusual, too.
Part = tuple[str, ScoreRows, Fitted]


@dataclass(frozen=True)
class Settings:
    """How blocks fit their scores."""

    log: bool  # whether to take the logarithms of squared norms
    count: int  # clean samples of the smallest fit; it gives all fits as many components, so that scores compare


class Block:
    """Base class of all blocks.

    Attributes:
        name: The block's key in feature mappings, and the name of its part of the detector.
        alarm: What its alarm means, in plain words that can follow "Mostly because:"; if empty, its name stands there.
        ranks: Numbers of dimensions that its tensor may have.
        shapes: The allowed shapes, in words.
        squared_norms: Whether it holds squared norms, of which detectors take logarithms.
        live: Whether only a live model can serve it: an exported file has no gradients.
    """

    name: ClassVar[str]
    alarm: ClassVar[str] = ""
    ranks: ClassVar[tuple[int, ...]] = (2,)
    shapes: ClassVar[str] = "(B, D)"
    squared_norms: ClassVar[bool] = False
    live: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Refuse a name that a part of a detector cannot have."""
        super().__init_subclass__()
        name = getattr(cls, "name", "")
        if "." in name or name == CHALLENGE_CLASSIFIER or hasattr(FittedList(), name):
            raise ValueError(
                f"name of a block must have no dot and be none of PyTorch's or fastgrad's; it was {name!r}"
            )

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that recreate this block (JSON)."""
        return {}

    def refusal(self, subject: Subject) -> str | None:
        """Return why this block cannot serve a network or input, or None if it can."""
        return None

    def price(self, subject: Subject) -> float:
        """Return the predicted price in forward passes, in addition to the one that gives the logits."""
        return 0.0

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """Return what to read in the forward pass; ``mask`` ``(B, T)``, if any, marks the positions that count."""
        return ()

    def values(self, found: Pass) -> Tensor:
        """Return the block ``(B, ...)`` from what a pass has found."""
        raise NotImplementedError(f"the block {self.name!r} must define values")

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """Yield one-class scores, fitted on clean ``blocks``."""
        yield from ()

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> ScoreRows:
        """Return what the challenge classifier sees of the block, standardised."""
        return cls.rows(blocks, settings)

    @classmethod
    def rows(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> ScoreRows:
        """Return the block's standardised columns, for norms of their logarithms; ``how`` goes to `ScoreRows.fit`."""
        norms = cls.squared_norms
        return ScoreRows.fit(blocks, cls.name, norms=norms, log=norms and settings.log, **how)

    @classmethod
    def distance(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> Part:
        """Return the score that is the Mahalanobis distance of `rows`, each column clipped at `CLIP`."""
        rows = cls.rows(blocks, settings, clip=CLIP, **how)
        return f"{cls.name}_distance", rows, Mahalanobis.fit(rows.of(blocks))

    @classmethod
    def mixture(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> Part:
        """Return the score that is minus the log density of a Gaussian mixture on principal components of `rows`."""
        dimensions = min(_DIMENSIONS, max(1, settings.count // 10))
        rows = cls.rows(blocks, settings, dimensions=dimensions, **how)
        values = rows.of(blocks)
        components = max(1, min(_COMPONENTS, settings.count // (5 * values.shape[1])))
        return f"{cls.name}_mixture", rows, GaussianMixture.fit(values, components)
