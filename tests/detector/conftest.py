from __future__ import annotations

import pytest
from small_images import images, small_network

from fastgrad import TwoStageModel
from fastgrad.blocks import DEFAULT_BLOCKS


@pytest.fixture(scope="session")
def fitted() -> TwoStageModel:
    """A model with every part. Its labels are such that h knows them and the network does not: a correction is kept."""
    x = images(200)
    labels = (x[:, 0].mean((1, 2)) > 0.5).long() + 2 * (x[:, 1].mean((1, 2)) > 0.5).long()
    pairs = list(zip(x.split(50), labels.split(50), strict=True))
    return TwoStageModel(small_network(), blocks=[*DEFAULT_BLOCKS, "view"]).fit(pairs, correct=True, verbose=False)
