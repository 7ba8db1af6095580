"""Which scores a detector is made of, given the blocks there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fastgrad.blocks import BLOCKS
from fastgrad.blocks.block import Part, Settings
from fastgrad.detector.supervised import Joint
from fastgrad.scores.fitted import Fitted, Sequence

Array = NDArray[np.float64]


def one_class_scores(blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
    """Name, rows, fitted score and kind of meaning of every one-class score that clean ``blocks`` allow."""
    for name, block in BLOCKS.items():
        if name in blocks:
            yield from block.scores(blocks, settings)


def joint_rows(blocks: Mapping[str, Array], settings: Settings) -> Joint:
    """What H sees: every block's own rows, standardised, side by side."""
    with torch.no_grad():
        parts: dict[str, Fitted] = {name: BLOCKS[name].joint(blocks, settings) for name in blocks}
        return Joint(parts=Sequence(**parts))
