"""Other trainings, with which the published tables of Purview and of introspective learning compare.

Each is one short function, and the network is small, so that all of them take an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection import cache, train
from bench.detection.architectures import Classifier
from bench.detection.registry import Options

#: The only network that is small enough.
NETWORK = "resnet"


def noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Add Gaussian noise of a random strength."""
    return (x + 0.2 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)


def augmix(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Apply AugMix (Hendrycks et al., ICLR 2020) without its consistency loss; sixteen images share random draws."""
    from torchvision.transforms.v2 import AugMix

    parts = [AugMix()(part) for part in (255 * x).byte().split(16)]
    return torch.cat(parts).float() / 255


def adversarial(model: nn.Module, x: Tensor, y: Tensor, radius: float = 4 / 255) -> Tensor:
    """Take one gradient sign step from a random start (Wong et al., "Fast is better than free", ICLR 2020)."""
    start = (x + radius * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    return (x + (start.detach() + 1.25 * radius * slope.sign() - x).clamp(-radius, radius)).clamp(0, 1)


#: Changes of every batch of a training, by the name in the table.
CHANGES: Mapping[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "trained on noise": noise, "trained on AugMix": augmix, "trained on attacks": adversarial,
}  # fmt: skip


class Denoised(nn.Module):
    """A network that sees the median of 3x3 pixels around each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(F.pad(x, (1,) * 4, mode="reflect"), 3).view(*x.shape[:2], 9, *x.shape[2:])
        return self.model(windows.median(2).values)


def contrastive(model: Any, images: Tensor, labels: Tensor, *, epochs: int = 8) -> None:
    """Train by SimCLR (Chen et al., ICML 2020): two views of an image attract. Then train the last layer on labels."""
    from torchvision.transforms import v2

    view = v2.Compose(
        [v2.RandomResizedCrop(32, (0.3, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
         v2.RandomGrayscale(0.2)]
    )  # fmt: skip
    width, head = model.fc.in_features, model.fc
    model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(256):
            both = torch.cat([torch.cat([view(part) for part in images[index].split(16)]) for _ in range(2)])
            z = F.normalize(model(both), dim=1)
            likeness = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
            loss = F.cross_entropy(likeness, torch.arange(len(z)).roll(len(index)))
            descent.zero_grad()
            loss.backward()
            descent.step()
    model.fc = nn.Identity()
    with torch.no_grad():
        h = torch.cat([model.eval()(x) for x in images.split(500)])
    model.fc = head
    train.fit_layer(head, h, labels, epochs=20, rate=1e-2, batch=512)


class Centroids(nn.Module):
    """DUQ (van Amersfoort et al., ICML 2020): kernels around moving centroids, with its authors' constants."""

    def __init__(self, body: Classifier) -> None:
        super().__init__()
        classes, width = body.fc.out_features, body.fc.in_features
        body.fc = nn.Identity()  # type: ignore[assignment]
        self.body, self.weight = body, nn.Parameter(torch.randn(classes, width, width) / width**0.5)
        self.register_buffer("sums", 0.05 * torch.randn(classes, width))
        self.register_buffer("counts", torch.ones(classes))

    def embedded(self, x: Tensor) -> Tensor:
        """Return an embedding for each class, ``(B, N, D)``."""
        return torch.einsum("nde,be->bnd", self.weight, self.body(x)).float()

    def distances(self, z: Tensor) -> Tensor:
        """Return minus the logarithms ``(B, N)`` of kernels of length 0.1."""
        return (z - self.sums / self.counts[:, None]).square().mean(2) / 0.02

    def forward(self, x: Tensor) -> Tensor:
        """Return kernels ``(B, N)`` in [0, 1]."""
        return (-self.distances(self.embedded(x))).exp()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the cross entropy of kernels with DUQ's gradient penalty, and move the centroids."""
        truth = F.one_hot(y, len(self.counts)).float()
        z = self.embedded(x.requires_grad_())
        d = self.distances(z)
        # Computed from logarithms: a kernel that underflows would have no gradient.
        loss = torch.where(truth > 0, d, -torch.log(-torch.expm1(-d.clamp_min(1e-6)))).sum(1).mean()
        (slope,) = torch.autograd.grad((-d).exp().sum(), x, create_graph=True)
        with torch.no_grad():
            self.counts.lerp_(truth.sum(0), 0.001)
            self.sums.lerp_((z * truth[..., None]).sum(0), 0.001)
        return loss + 0.5 * (slope.flatten(1).square().sum(1) - 1).square().mean()


def kept(
    name: str, options: Options, training: Callable[[Any, Tensor, Tensor], object], make: Callable[[], nn.Module]
) -> nn.Module:
    """Return a network from the cache, or after its ``training`` on the images that networks are trained on."""
    torch.manual_seed(0)
    path, recipe = options.cache / f"{NETWORK}-{name.replace(' ', '-')}.pt", {"network": NETWORK, "recipe": name}
    model = cache.weights(path, make(), recipe, lambda own: training(own, *train.shown(options.data)))
    return model.requires_grad_(False)


def centroids(options: Options) -> nn.Module:
    training = partial(train.fit, loss_of=Centroids.loss, epochs=train.EPOCHS[NETWORK], seed=0, rate=0.05)
    return kept("DUQ", options, training, lambda: Centroids(train.NETWORKS[NETWORK]()))


def networks(options: Options, plain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the network of each training by its name, and the plain one behind a filter."""
    how = {"epochs": train.EPOCHS[NETWORK], "seed": 0, "rate": train.RATES[NETWORK]}
    for name, change in CHANGES.items():
        yield name, kept(name, options, partial(train.fit, change=change, **how), train.NETWORKS[NETWORK])
    yield "SimCLR", kept("SimCLR", options, contrastive, train.NETWORKS[NETWORK])
    yield "denoised", Denoised(plain)
