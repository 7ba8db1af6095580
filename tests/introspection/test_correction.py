"""The correction of answers to unusual inputs: kept only if it answers better."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.blocks import Features
from fastgrad.introspection.correction import choose, mixed


def labelled(count: int, *, shift: float) -> tuple[Features, Tensor, Tensor]:
    """Clean inputs and one challenge of each, whose h is moved by ``shift`` where the network does not look.

    Also their logits, and log odds of a challenge.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    h = torch.eye(6)[labels] + 0.3 * torch.randn(count, 6, generator=generator)
    moved = torch.eye(6)[3 + labels] * shift + torch.randn(count, 6, generator=generator)
    both, kinds = torch.cat([h, moved]), [""] * count + ["moved"] * count
    features = Features.of(
        4 * both[:, :3], {"features": both}, kinds=kinds, sources=torch.arange(count).repeat(2), labels=labels.repeat(2)
    )
    return features, features.logits, torch.where(features.challenging, 4.0, -4.0).double()


def test_correction_by_h() -> None:
    found = choose(*labelled(150, shift=3.0), 0)
    assert found.correction is not None
    new, logits, odds = labelled(400, shift=3.0)
    network = logits.double().log_softmax(1)
    log_p = mixed(network, found.correction(new.blocks["features"], logits.double()), odds)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(800).double())
    right, alone = ((v.argmax(1) == new.labels).double() for v in (log_p, network))
    assert right[new.challenging].mean() > alone[new.challenging].mean() + 0.2
    assert right[~new.challenging].mean() > alone[~new.challenging].mean() - 0.01
    # The answers by folds say what answers to new inputs are like.
    estimate = (found.log_p.argmax(1) == labelled(150, shift=3.0)[0].labels)[150:].double().mean()
    assert abs(float(estimate - right[new.challenging].mean())) < 0.1
    assert found.words.startswith("kept: ")
    assert "of 150 clean inputs right by the network" in found.words


def test_without_anything_to_correct_the_network_answers_alone() -> None:
    features, logits, odds = labelled(60, shift=0.0)
    logits = torch.where(features.challenging.unsqueeze(1), 0.0, logits)
    found = choose(features, logits, odds, 0)
    assert found.correction is None
    assert found.words.startswith("not kept: ")
    assert torch.equal(found.log_p, logits.double().log_softmax(1))
    anyway = choose(features, logits, odds, 0, always=True)
    assert anyway.correction is not None
    assert anyway.words == found.words.replace("not kept", "kept as asked, but not certainly better")
