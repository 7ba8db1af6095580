"""A small fitted and exported model that the other examples use in place of yours."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import fastgrad


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1,797 images ``(B, 3, 16, 16)`` in [0, 1] and their labels, in random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].contiguous(), torch.tensor(data.target)[order]


def trained(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Train a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(50):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def export(path: Path) -> Path:
    """Fit the detector on images that the network was not trained on; write one file."""
    images, labels = digits()
    model = trained(images[:900], labels[:900])
    # Named blocks have no cost limit: on so small a network, the fixed cost of each call would exceed it.
    blocks = ["logits", "activations", "image"]
    two_stage = fastgrad.TwoStageModel(model, blocks=blocks).fit([(images[900:1500], labels[900:1500])])
    names = [str(digit) for digit in range(10)]
    return Path(fastgrad.export(two_stage, images[:1], path, labels=names, mean=[0.0] * 3, std=[1.0] * 3, max_batch=16))
