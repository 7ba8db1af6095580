"""Local statistics of the input image, whatever the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings, mixture
from fastgrad.blocks.image_statistics import image_statistics
from fastgrad.blocks.passes import Pass
from fastgrad.blocks.subject import Subject

# The 28 statistics vary together: beyond these components lies little but the noise of estimation.
_DIMENSIONS = 16


class Image(Block):
    """`image_statistics` of the input, ``(B, 28)``."""

    name = "image"
    alarm = "brightness, sharpness or noise unlike those of known images"
    shapes = "(B, K)"

    def refusal(self, subject: Subject) -> str | None:
        """Inputs that hold no image, or several."""
        return None if subject.image is not None else "the input is not one image (B, C, H, W)"

    def values(self, found: Pass) -> Tensor:
        """The statistics."""
        return image_statistics(found.image())

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """A mixture."""
        yield mixture(cls.name, blocks, settings, log=False, dimensions=_DIMENSIONS)
