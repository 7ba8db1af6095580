"""One sample whose gradient reaches a batch norm channels last, where PyTorch's own gradients on a CPU are wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastgrad


class Tokens(nn.Module):
    """Convolutional features as a sequence of tokens, tokens first, as PyTorch's attention takes them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.token, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.convolution(x)).flatten(2).permute(2, 0, 1)
        return self.head(self.token(tokens).tanh().sum(0))


def test_one_sample_has_the_norms_that_it_has_in_a_batch() -> None:
    torch.manual_seed(0)
    model, x = Tokens().double().eval(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model)
    _, together = extractor(x)
    alone = torch.cat([extractor(one[None])[1] for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=0)
    losses = model(x).square().sum(1)
    truth = [
        torch.autograd.grad(loss, model.convolution.weight, retain_graph=True)[0].square().sum() for loss in losses
    ]
    for one, norm in zip(x, truth, strict=True):
        with fastgrad.record(model):
            loss = model(one[None]).square().sum()
            (found,) = fastgrad.grad_sqnorm(loss, [model.convolution.weight])
        torch.testing.assert_close(found[0], norm, rtol=1e-10, atol=0)
