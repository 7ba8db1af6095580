"""The correction of answers to unusual inputs: kept only if it answers better."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgrad.introspection.correction import Labelled, choose, mixed


def labelled(count: int, *, shift: float) -> Labelled:
    """Clean inputs and one challenge of each, whose h is moved by ``shift`` where the network does not look."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    h = torch.eye(6)[labels] + 0.3 * torch.randn(count, 6, generator=generator)
    moved = torch.eye(6)[3 + labels] * shift + torch.randn(count, 6, generator=generator)
    both, challenging = torch.cat([h, moved]), torch.arange(2 * count) >= count
    logits = 4 * both[:, :3]
    odds = torch.where(challenging, 4.0, -4.0).double()
    return Labelled(both, logits, odds, labels.repeat(2), challenging, np.tile(np.arange(count), 2))


def test_what_h_knows_beside_the_logits_corrects_challenges_and_leaves_clean_inputs() -> None:
    found = choose(labelled(150, shift=3.0), 0)
    assert found.correction is not None
    new = labelled(400, shift=3.0)
    network = new.logits.double().log_softmax(1)
    log_p = mixed(network, found.correction(new.h, new.logits.double()), new.odds)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(800).double())
    right, alone = ((v.argmax(1) == new.labels).double() for v in (log_p, network))
    assert right[new.challenging].mean() > alone[new.challenging].mean() + 0.2
    assert right[~new.challenging].mean() > alone[~new.challenging].mean() - 0.01
    # The answers by folds say what answers to new inputs are like.
    estimate = (found.log_p.argmax(1) == labelled(150, shift=3.0).labels)[150:].double().mean()
    assert abs(float(estimate - right[new.challenging].mean())) < 0.1
    assert found.words.startswith("kept: ")
    assert "of 150 clean inputs right by the network" in found.words


def test_without_anything_to_correct_the_network_answers_alone() -> None:
    data = labelled(60, shift=0.0)
    data = replace(data, logits=torch.where(data.challenging.unsqueeze(1), 0.0, data.logits))
    with pytest.warns(
        UserWarning, match=r"correct=True: no correction .* of 60 challenges right by the network, .* points"
    ):
        found = choose(data, 0)
    assert found.correction is None
    assert found.words.startswith("not kept: ")
    assert torch.equal(found.log_p, data.logits.double().log_softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anyway = choose(data, 0, always=True)
    assert anyway.correction is not None
    assert anyway.words == found.words.replace("not kept", "kept as asked, but not certainly better")
