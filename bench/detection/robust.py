"""Networks made robust in other ways, on top of the trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.architectures import Classifier
from bench.detection.registry import Options
from bench.detection.train import Recipe, fit, trained
from fastgrad.challenges import fgsm
from fastgrad.challenges.pixels import PixelRange

TECHNIQUES = ("plain", "denoising", "adversarial training", "SimCLR", "noise augmentation", "AugMix")


class Denoised(nn.Module):
    """A 3x3 median filter before the network."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.fc = model, model.fc

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features of the filtered image."""
        patches = F.unfold(F.pad(x, (1,) * 4, mode="replicate"), 3)
        median = patches.view(len(x), x.shape[1], 9, -1).median(2).values
        return self.model.features(median.view_as(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the filtered image."""
        return self.fc(self.features(x))


def _noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    strength = 0.15 * torch.rand(len(x), 1, 1, 1)
    return (x + strength * torch.randn_like(x)).clamp(0, 1)


def _attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    pixels = PixelRange.of(x, clip=(0, 1))
    attacked = fgsm(model, x, 4 / 255, torch.Generator(), pixels=pixels)
    model.train()
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, attacked, x)


def _augmix(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from torchvision.transforms import v2

    mix = v2.AugMix()
    return torch.stack([mix((image * 255).to(torch.uint8)) for image in x]).float() / 255


CHANGES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "noise augmentation": _noise,
    "adversarial training": _attack,
    "AugMix": _augmix,
}


def contrastive(model: Classifier, images: Tensor, epochs: int, seed: int) -> None:
    """SimCLR (Chen et al. 2020): two views of an image attract each other; the backbone alone is trained."""
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[-1], (0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.RandomGrayscale(0.2),
        ]
    )
    torch.manual_seed(seed)
    width = model.fc.in_features
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    optimizer = torch.optim.SGD(
        [*model.parameters(), *head.parameters()], lr=0.03, momentum=0.9, weight_decay=5e-4
    )
    model.train()
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images)), 128):
            # One random view for every sixteen images: enough variety, a sixteenth of the calls.
            views = [torch.cat([view(part) for part in torch.split(images[index], 16)]) for _ in range(2)]
            z = F.normalize(head(model.features(torch.cat(views))), dim=1)
            similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
            partner = torch.arange(len(z)).roll(len(index))
            loss = F.cross_entropy(similar, partner)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def robust(technique: str, recipe: Recipe, options: Options, images: Tensor, labels: Tensor) -> nn.Module:
    """The network of a technique: the plain one fine-tuned, or with a filter before it. Cached."""
    model = trained(recipe, options.data, options.cache)
    if technique == "plain":
        return model
    if technique == "denoising":
        return Denoised(model).eval()
    epochs = 2 if options.quick else 20

    def train(model: nn.Module) -> None:
        torch.manual_seed(recipe.seed)
        if technique == "SimCLR":
            contrastive(model, images, epochs, recipe.seed)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in model.fc.parameters():
                parameter.requires_grad_(True)
        fit(model, images, labels, epochs=epochs, seed=recipe.seed, rate=0.05, change=CHANGES.get(technique))
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    path = options.cache / f"{technique.replace(' ', '-')}-{epochs}-{len(images)}-{recipe.file()}"
    made_by = asdict(recipe) | {"technique": technique, "more epochs": epochs, "images": len(images)}
    return cache.weights(path, model, made_by, train)
