"""What a block is: something that a detector reads of an input, with its price and its one-class scores.

To the network it says which modules it reads and which gradients it needs; all blocks share one forward pass. To the
detector it says which one-class scores can be fitted on its tensor, and what the classifier of challenges sees of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastgrad.checks import Array as Array
from fastgrad.scores.fitted import Fitted, Sequence
from fastgrad.scores.gaussian_mixture import GaussianMixture
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.rows import Rows

if TYPE_CHECKING:
    from fastgrad.blocks.extraction import Pass, Signal
    from fastgrad.blocks.subject import Subject
    from fastgrad.engine.run import Reading

#: The classifier of challenges among the sources of evidence, where the others are blocks.
CHALLENGE_CLASSIFIER = "challenges"
#: Standardised columns are cut here: no single one decides alone.
CLIP = 8.0
#: Gaussians of a mixture, and principal components that it sees, at most. Image statistics and roughness, from clean
#: data, attacks on a ResNet-20: eight Gaussians on 16 components AUROC .91, one Gaussian .84, one on 4 components .76.
_COMPONENTS, _DIMENSIONS = 8, 16
#: Principal components of h, and of activations, that the challenge classifier sees, and the columns beside them. What
#: a challenge changes lies for the most part where clean data do not vary. AUROC with the columns and without:
#: EfficientNet-Lite0 .906 and .902 (1,024 columns .903, all 21,008 .906), ResNet-20, attacks after JPEG, .640 and .617.
JOINT = {"dimensions": 64, "beside": 4096}
#: Name, rows and fitted score of a one-class score; with the option ``two_sided=True`` it can be too good to be true.
Part = tuple[str, Rows, Fitted]


@dataclass(frozen=True)
class Settings:
    """How blocks fit their scores."""

    log: bool  # whether the logarithms of squared norms are to be taken
    count: int  # clean samples of the smallest fit: by it all fits, whose scores are compared, have as many components


class Block:
    """Base class of all blocks.

    Attributes:
        name: The block's key in feature mappings; a part of the detector has it, too.
        alarm: What its alarm means, in words for everyone, to follow "Mostly because:"; empty for its name.
        ranks: Numbers of dimensions that its tensor may have.
        shapes: The same in words.
        squared_norms: Whether it holds squared norms, which detectors take the logarithm of.
    """

    name: ClassVar[str]
    alarm: ClassVar[str] = ""
    ranks: ClassVar[tuple[int, ...]] = (2,)
    shapes: ClassVar[str]
    squared_norms: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Refuse a name that no part of a detector can have."""
        super().__init_subclass__()
        name = getattr(cls, "name", "")
        if "." in name or name == CHALLENGE_CLASSIFIER or hasattr(Sequence(), name):
            raise ValueError(
                f"name of a block must have no dot and be none of PyTorch's or fastgrad's; it was {name!r}"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments that make this block again (JSON)."""
        return {}

    def refusal(self, subject: Subject) -> str | None:
        """Why this network or input cannot be served, or None."""
        return None

    def price(self, subject: Subject) -> float:
        """Predicted price beyond the forward pass that gives the logits, in forward passes."""
        return 0.0

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """What it reads in the forward pass; ``mask`` ``(B, T)`` marks the positions that count, if there is one."""
        return ()

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        """What it sends back from the logits, for the squared norms of all parameters' gradients."""
        return ()

    def values(self, found: Pass) -> Tensor:
        """The block ``(B, ...)`` from what a pass has found."""
        raise NotImplementedError(f"the block {self.name!r} must define values")

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """The one-class scores that clean ``blocks`` allow."""
        yield from ()

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """What the classifier of challenges sees of the block, standardised."""
        return cls.rows(blocks, settings)

    @classmethod
    def rows(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> Rows:
        """The block's standardised columns, of norms their logarithms; ``how`` goes to `Rows.fit`."""
        norms = cls.squared_norms
        return Rows.fit(blocks, cls.name, norms=norms, log=norms and settings.log, **how)

    @classmethod
    def distance(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> Part:
        """The score that is the Mahalanobis distance of `rows`, each column cut at `CLIP`."""
        rows = cls.rows(blocks, settings, clip=CLIP, **how)
        return f"{cls.name}_distance", rows, Mahalanobis.fit(rows.of(blocks))

    @classmethod
    def mixture(cls, blocks: Mapping[str, Array], settings: Settings, **how: Any) -> Part:
        """The score that is the density of a Gaussian mixture on the principal components of `rows`."""
        dimensions = min(_DIMENSIONS, max(1, settings.count // 10))
        rows = cls.rows(blocks, settings, dimensions=dimensions, **how)
        values = rows.of(blocks)
        components = max(1, min(_COMPONENTS, settings.count // (5 * values.shape[1])))
        return f"{cls.name}_mixture", rows, GaussianMixture.fit(values, components)
