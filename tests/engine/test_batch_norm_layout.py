"""One sample whose gradient reaches a batch norm channels last, where PyTorch's own gradients on a CPU are wrong."""

from __future__ import annotations

from typing import Any

import torch
from gradient_oracle import loss_norms
from small_nets import Net
from torch import Tensor, nn

import fastgrad


def tokens(net: Any, x: Tensor) -> Tensor:
    """Convolutional features as a sequence of tokens, tokens first, as PyTorch's attention takes them by default."""
    tokens = net.norm(net.convolution(x)).flatten(2).permute(2, 0, 1)
    return net.head(net.token(tokens).tanh().sum(0))


def test_one_sample_has_the_norms_that_it_has_in_a_batch() -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = Net(tokens, convolution=convolution, norm=norm, token=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.double().eval()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model)
    _, together = extractor(x)
    alone = torch.cat([extractor(one[None])[1] for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=0)
    truth = loss_norms(model(x).square().sum(1), model)[:, 0]
    for one, norm in zip(x, truth, strict=True):
        with fastgrad.record(model):
            loss = model(one[None]).square().sum()
            (found,) = fastgrad.grad_sqnorm(loss, [model.convolution.weight])
        torch.testing.assert_close(found[0], norm, rtol=1e-10, atol=0)
