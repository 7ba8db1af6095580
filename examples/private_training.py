"""Train privately: fastgrad clips each sample's gradient, Opacus adds the noise and counts epsilon."""

from __future__ import annotations

import torch
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizerFastGradientClipping
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import fastgrad

STEPS, BATCH, MAX_NORM, EPSILON, DELTA = 100, 200, 1.0, 8.0, 1e-4


def main() -> None:
    """Train on 1,500 digits and print accuracy and privacy loss."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    x, y, test, truth = images[:1500], labels[:1500], images[1500:], labels[1500:]
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    rate = BATCH / len(x)
    noise = get_noise_multiplier(
        target_epsilon=EPSILON, target_delta=DELTA, sample_rate=rate, steps=STEPS, accountant="rdp"
    )
    accountant = RDPAccountant()
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5),
        noise_multiplier=noise,
        max_grad_norm=MAX_NORM,
        expected_batch_size=BATCH,
    )
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=rate))
    for _ in range(STEPS):
        drawn = torch.rand(len(x)) < rate
        optimizer.zero_grad()
        with fastgrad.clip_gradients(model, MAX_NORM) as clipped:
            clipped.backward(cross_entropy(model(x[drawn]), y[drawn], reduction="none"))
        optimizer.step()
    accuracy = (model(test).argmax(1) == truth).float().mean()
    print(f"epsilon {accountant.get_epsilon(DELTA):.1f}, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
