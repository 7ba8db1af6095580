"""Other trainings of a small network, beside which the second answers stand; each is one change of every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bench.detection import cache, train
from bench.detection.experiment import Options

#: The only network that is small enough.
NETWORK = "resnet"


def noise(x: Tensor) -> Tensor:
    """Add Gaussian noise of a random strength."""
    return (x + 0.2 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)


def augmix(x: Tensor) -> Tensor:
    """Apply AugMix (Hendrycks et al., ICLR 2020) without its consistency loss; sixteen images share random draws."""
    from torchvision.transforms.v2 import AugMix

    parts = [AugMix()(part) for part in (255 * x).byte().split(16)]
    return torch.cat(parts).float() / 255


#: Changes of every batch of a training, by the name in the table.
CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {"trained on noise": noise, "trained on AugMix": augmix}


def trained(name: str, options: Options) -> nn.Module:
    """Return the network of a training by its name in `CHANGES`, from the cache or trained now."""
    recipe = train.RECIPES[NETWORK]

    def learn(own: nn.Module) -> None:
        train.fit(own, *train.shown(options.data), epochs=recipe.epochs, seed=0, rate=recipe.rate, change=CHANGES[name])

    torch.manual_seed(0)
    path, kept = options.cache / f"{NETWORK}-{name.replace(' ', '-')}.pt", {"network": NETWORK, "recipe": name}
    return cache.weights(path, recipe.make(), kept, learn).requires_grad_(False)
