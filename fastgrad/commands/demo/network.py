"""The demo's network and its training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastgrad.batches import bar
from fastgrad.commands.demo.digits import SIDE, LabelledImages

_BATCH = 50


def digit_network() -> nn.Sequential:
    """Three convolutions with batch norm and a linear last layer: ``(B, 1, 24, 24)`` to logits ``(B, 10)``."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        *block(64, 128),
        nn.Flatten(),
        nn.Linear(128 * (SIDE // 8) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(network: nn.Module, data: LabelledImages, *, epochs: int, generator: torch.Generator) -> None:
    """Train in place with Adam under a one-cycle schedule, and leave the network in evaluation mode."""
    steps = epochs * (len(data.images) // _BATCH)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in bar(range(epochs), "training the network", None):
        order = torch.randperm(len(data.images), generator=generator)
        for pick in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            loss = cross_entropy(network(data.images[pick]), data.labels[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval()
