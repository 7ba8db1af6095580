"""Which scores a detector is made of, given the blocks there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fastgrad.scores import Energy, GaussianMixture, Margin, NearestNeighbours
from fastgrad.scores.conformal import OneSided, TwoSided
from fastgrad.scores.fitted import Fitted, Sequence
from fastgrad.scores.rows import SQUARED_NORMS, Rows

from .blocks import as_tensor
from .supervised import Joint

Array = NDArray[np.float64]
# The 28 image statistics vary together: beyond these components lies little but the noise of estimation.
_IMAGE_DIMENSIONS = 16
Part = tuple[str, Rows, Fitted, type[OneSided] | type[TwoSided]]


def one_class_scores(
    blocks: Mapping[str, Array], *, log: bool, components: int, dimensions: int, neighbours: int, seed: int
) -> Iterator[Part]:
    """Name, rows, fitted score and kind of meaning of every one-class score that clean ``blocks`` allow.

    A mixture's density is low on one side only. Energy can be too good to be true: an attack that overshoots
    makes the network more certain than any clean image does, so it is two-sided. The margin between the two
    highest logits beside it is one-sided: an attack that stops at the boundary leaves a small one.
    """
    tensors = {name: as_tensor(array) for name, array in blocks.items()}
    count = len(next(iter(blocks.values())))
    for name in (*SQUARED_NORMS, "image"):
        if name in blocks:
            norms = name in SQUARED_NORMS
            rows = Rows.fit(
                blocks,
                name,
                rank=name == "contrasts",
                log=norms and log,
                dimensions=min(dimensions if norms else _IMAGE_DIMENSIONS, max(1, count // 10)),
            )
            values = rows(tensors).numpy()
            fewer = max(1, min(components, count // (5 * values.shape[1])))
            yield f"{name}_mixture", rows, GaussianMixture.fit(values, fewer, 1e-2, seed), OneSided
    if "logits" in blocks:
        yield "energy", Rows.fit(blocks, "logits", standardise=False), Energy(), TwoSided
        if blocks["logits"].shape[1] > 1:
            top_two = Rows.fit(blocks, "logits", top=2, standardise=False)
            yield "margin", top_two, Margin(), OneSided
    if "features" in blocks:
        rows = Rows.fit(blocks, "features", unit=True, standardise=False)
        bank = rows(tensors).numpy()
        yield "features_neighbours", rows, NearestNeighbours.fit(bank, neighbours), OneSided


def joint_rows(blocks: Mapping[str, Array], *, log: bool) -> Joint:
    """Everything there is, standardised, for H: log norms, the ten highest logits, the features."""
    parts: dict[str, Fitted] = {}
    for name in blocks:
        norms = name in SQUARED_NORMS
        parts[name] = Rows.fit(
            blocks, name, rank=name == "contrasts", log=norms and log, top=10 if name == "logits" else 0
        )
    with torch.no_grad():
        return Joint(parts=Sequence(**parts))
