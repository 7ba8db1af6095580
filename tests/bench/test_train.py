"""The recipe of the larger evaluated networks: whitening filters, and images that grow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.detection.train import fit, whiten


def test_whitening_filters_see_uncorrelated_patches_and_their_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 3, 12, 12, generator=generator).cumsum(3)  # neighbours are alike
    convolution = nn.Conv2d(3, 64, 3, bias=False)
    rest = convolution.weight[54:].detach().clone()
    whiten(convolution, images)
    outputs = convolution(images).transpose(0, 1).flatten(1)
    # 1e-3 is added to variances of .3 and more.
    torch.testing.assert_close(torch.cov(outputs[:27]), torch.eye(27), rtol=0, atol=0.01)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    assert torch.equal(convolution.weight[54:], rest)


def test_images_grow_in_equal_shares_of_the_passes() -> None:
    seen: list[int] = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape[-1])
            return self.layer(x.mean((2, 3)))

    images, labels = torch.rand(8, 3, 8, 8), torch.randint(0, 2, (8,))
    fit(Network(), images, labels, epochs=5, seed=0, batch=8, sizes=(4, 8))
    assert seen == [4, 4, 4, 8, 8]
