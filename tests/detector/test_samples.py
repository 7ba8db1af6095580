"""What a detector is fitted on: every kind of challenge gets its share, however few or small the batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fastgrad.blocks import Logits
from fastgrad.blocks.extraction import Extraction
from fastgrad.challenges import CHALLENGES
from fastgrad.detector.samples import Sources, collect


@pytest.mark.parametrize("batch", [8, 16, 120])
def test_every_kind_is_learned_from_and_judged(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    images = torch.rand(240, 3, 4, 4)
    sources = Sources(images.split(batch), None, None, 5000, 240, 2, 0, False)
    samples = collect(Extraction(model, [Logits()]), model, torch.device("cpu"), sources)
    clean = sum(kind == "" for kind in samples.kinds)
    assert clean == 240
    assert len(samples.kinds) == 3 * 240
    for held_out in (False, True):
        counts = Counter(
            kind
            for kind, held in zip(samples.kinds, samples.held_out, strict=True)
            if held == held_out and kind
        )
        assert set(counts) == set(CHALLENGES)
        # A kind of three strengths gets three times as many as one of one; turns are at most one round apart.
        shares = [counts[name] / len(kind.strengths) for name, kind in CHALLENGES.items()]
        assert max(shares) <= 4 * min(shares)
