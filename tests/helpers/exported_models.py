"""Fitted two-stage models for the tests of exported files, and what they see."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fastgrad.detector.model import TwoStageModel

X = torch.zeros(1, 3, 8, 8)


def shapes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images ``(count, 3, 8, 8)`` of four coloured patterns, each as strong as it happens to be."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (count,), generator=generator)
    strength = torch.rand(count, 1, 1, 1, generator=generator)
    return strength * patterns[labels] + 0.7 * torch.randn(count, 3, 8, 8, generator=generator), labels


#: Blocks by what an exported graph must hold for them.
FORMS = {
    "forward": ["logits", "features", "activations", "image", "roughness"],  # with a correction
    "view": ["logits", "activations", "view"],
    "contrasts": ["contrasts", "logits", "features", "image"],
}


@functools.cache
def two_stage_model(form: str) -> TwoStageModel:
    """A trained and fitted model with a convolution, in-place activations and a batch norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(384, 4)
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(40):
        x, labels = shapes(64, 1000 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    # In training mode, as it comes from a training loop: a fitted module is exported as it is.
    live = TwoStageModel(net, blocks=FORMS[form])
    if form != "forward":
        return live.fit([(shapes(400, 1)[0],)], challenges=None)
    # Labels that the network does not know, but h does.
    x, labels = shapes(400, 1)
    live.fit([(x, (labels + 1) % 4)], correct=True)
    assert live.correction_ is not None
    return live
