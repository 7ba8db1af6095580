"""DUQ (van Amersfoort et al. 2020), on top of a trained network."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper import cache
from bench.paper.data import sets
from bench.paper.networks import Classifier
from bench.paper.table import Options
from bench.paper.train import Recipe, augment_crop, trained


class DUQ(nn.Module):
    """Deterministic uncertainty quantification: an RBF kernel to one centroid per class in place of logits."""

    def __init__(self, backbone: Classifier, classes: int = 10, size: int = 64, length: float = 0.3) -> None:
        super().__init__()
        self.backbone, self.length = backbone, length
        width = backbone.fc.in_features
        self.weight = nn.Parameter(torch.randn(size, classes, width) / width**0.5)
        self.register_buffer("count", torch.full((classes,), 20.0))
        self.register_buffer("total", torch.randn(size, classes) * 20 * 0.05)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings ``(B, size, classes)``."""
        return torch.einsum("snd,bd->bsn", self.weight, self.backbone.features(x))

    def kernel(self, embedded: Tensor) -> Tensor:
        """Correlation with every class's centroid ``(B, classes)``, in (0, 1]."""
        square = (embedded - (self.total / self.count)).square().mean(1)
        return torch.exp(-square / (2 * self.length**2))

    @torch.no_grad()
    def update(self, embedded: Tensor, onehot: Tensor, momentum: float = 0.99) -> None:
        """Moving averages of the centroids."""
        self.count.mul_(momentum).add_((1 - momentum) * onehot.sum(0))
        self.total.mul_(momentum).add_((1 - momentum) * torch.einsum("bsn,bn->sn", embedded, onehot))

    def forward(self, x: Tensor) -> Tensor:
        """Kernel values ``(B, classes)``; uncertainty is one minus the largest."""
        return self.kernel(self.embed(x))


def trained_duq(recipe: Recipe, options: Options, epochs: int, images_used: int) -> DUQ:
    """DUQ with the two-sided gradient penalty, started from the trained network; cached."""
    made_by = asdict(recipe) | {"duq epochs": epochs, "images": images_used}
    model = DUQ(trained(recipe, options.data, options.cache))

    def train(model: DUQ) -> None:
        images, labels = sets.load(options.data, recipe.dataset, "train", images_used).labelled()
        padded = F.pad(images, (3,) * 4, mode="reflect")
        torch.manual_seed(recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            model.train()
            for index in torch.split(torch.randperm(len(images), generator=generator), 128):
                x = augment_crop(images, padded, index, generator).requires_grad_()
                onehot = F.one_hot(labels[index], 10).float()
                embedded = model.embed(x)
                values = model.kernel(embedded)
                loss = F.binary_cross_entropy(values.clamp(1e-6, 1 - 1e-6), onehot)
                (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
                penalty = (slope.flatten(1).square().sum(1) - 1).square().mean()
                optimizer.zero_grad()
                (loss + 0.05 * penalty).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                model.update(embedded.detach(), onehot)

    path = options.cache / f"duq-{epochs}-{images_used}-{recipe.file()}"
    return cache.weights(path, model, made_by, train)  # type: ignore[arg-type, return-value]
