"""What a block is: something that a detector reads of an input, with its price and its one-class scores.

A block is added by adding a file to this room and its class to `fastgrad.blocks.BLOCKS`. It has two sides. On the
side of the network it says which modules it reads and which gradients it needs, and makes its tensor from them;
all blocks share one forward pass. On the side of the detector it says which shapes it takes, which one-class scores
can be fitted on it, and what the classifier of challenges sees of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.scores.conformal import OneSided, TwoSided
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.rows import Rows

if TYPE_CHECKING:
    from fastgrad.blocks.passes import Pass, Signal
    from fastgrad.blocks.subject import Subject
    from fastgrad.engine.run import Reading

Array = NDArray[np.float64]
#: Standardised columns are cut here: no single one decides alone.
CLIP = 8.0
#: Principal components that are scored of a block whose columns say nearly the same. Photographs, clean data alone,
#: EfficientNet-Lite0: 4, 6, 8 and 16 give .840, .829, .828 and .815; a mixture of Gaussians on 16 gave .811.
FEW = 4
#: Name, rows, fitted score and meaning of a one-class score.
Part = tuple[str, Rows, Fitted, type[OneSided] | type[TwoSided]]


class Block:
    """Base of all blocks; a subclass a file.

    Attributes:
        name: The block's key in feature mappings.
        alarm: What an alarm that it raises means, in words for everyone, to follow "Mostly because:"; empty for its
            name.
        ranks: Numbers of dimensions that its tensor may have.
        shapes: The same in words.
        squared_norms: Whether it holds squared norms, which detectors take the logarithm of.
    """

    name: ClassVar[str]
    alarm: ClassVar[str] = ""
    ranks: ClassVar[tuple[int, ...]] = (2,)
    shapes: ClassVar[str]
    squared_norms: ClassVar[bool] = False

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
        raise NotImplementedError

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], log: bool) -> Iterator[Part]:
        """The one-class scores that clean ``blocks`` allow; ``log``: squared norms are no logarithms yet."""
        yield from ()

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], log: bool) -> Rows:
        """What the classifier of challenges sees of the block, standardised."""
        return cls.rows(blocks, log)

    @classmethod
    def rows(cls, blocks: Mapping[str, Array], log: bool, **how: Any) -> Rows:
        """The block's standardised columns, of norms their logarithms; ``how`` goes to `Rows.fit`."""
        norms = cls.squared_norms
        return Rows.fit(blocks, cls.name, norms=norms, log=norms and log, **how)

    @classmethod
    def distance(cls, blocks: Mapping[str, Array], log: bool, **how: Any) -> Part:
        """The score that is the Mahalanobis distance of `rows`, each column cut at `CLIP`."""
        rows = cls.rows(blocks, log, clip=CLIP, **how)
        return f"{cls.name}_distance", rows, Mahalanobis.fit(rows.of(blocks)), OneSided
