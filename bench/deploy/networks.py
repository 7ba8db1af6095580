"""The exported networks and the images they are shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.data import photographs, sets
from bench.detection.train import fit

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Images:
    """Batches of images, prepared for the network: CIFAR-10's, or smooth noise where there is no ``root``."""

    def __init__(self, root: Path | None, size: int) -> None:
        self.root, self.size = root, size

    def __call__(self, count: int, seed: int) -> Tensor:
        """``(count, 3, size, size)``, test images from number ``50 * seed`` on."""
        if self.root is None:
            generator = torch.Generator().manual_seed(seed)
            coarse = torch.randn(count, 3, 8, 8, generator=generator)
            fine = torch.randn(count, 3, self.size, self.size, generator=generator)
            return nn.functional.interpolate(coarse, (self.size, self.size), mode="bilinear") + 0.3 * fine
        return self.prepare(sets.load(self.root, "cifar10", "test", count, 50 * seed).tensor(), self.size)

    def held_out(self, count: int) -> Tensor:
        """Clean images that the network was not trained on, to fit the detector."""
        if self.root is None:
            return self(count, 1)
        return self.prepare(sets.load(self.root, "cifar10", "train", count, -5000).tensor(), self.size)

    def training(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Images to train on, still small, and their labels."""
        x, y = sets.load(self.root, "cifar10", "train", count, 0).labelled()
        return self.prepare(x, size), y

    @staticmethod
    def prepare(pixels: Tensor, size: int) -> Tensor:
        """Normalized, resized, contiguous: in another memory layout the live model's sums have another order."""
        normalized = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
        return nn.functional.interpolate(normalized, (size, size), mode="bilinear").contiguous()


class Photographs(Images):
    """Batches of photographs, pixels in [0, 1]."""

    def __call__(self, count: int, seed: int) -> Tensor:
        """``(count, 3, 224, 224)``."""
        if self.root is None:
            return super().__call__(count, seed)
        return self._some(50 * seed, count)

    def held_out(self, count: int) -> Tensor:
        """Images that no other batch holds."""
        return super().held_out(count) if self.root is None else self._some(-count, count)

    def _some(self, start: int, count: int) -> Tensor:
        assert self.root is not None
        images = photographs.photographs(self.root).images
        order = np.roll(np.random.default_rng(0).permutation(len(images)), -start)
        return sets.to_tensor(images[order[:count]]).contiguous()


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        import torchvision.models as models

        net: nn.Module = getattr(models, name)(num_classes=classes)
        return net

    return build


#: How each is built, given the number of classes.
NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "efficientnet_lite0": lambda classes: photographs.network(pixels=True),
    "vit_b_16": _torchvision("vit_b_16"),
}


def images_of(name: str, root: Path | None) -> Images:
    """What a network is shown."""
    return (Photographs if name == "efficientnet_lite0" else Images)(root, 224)


def network(name: str, images: Images, folder: Path) -> nn.Module:
    """A network with published weights, untrained, or made to know CIFAR-10 in minutes and kept in ``folder``."""
    torch.manual_seed(0)
    if images.root is None or isinstance(images, Photographs):
        return NETWORKS[name](1000).eval()

    def learn(net: nn.Module) -> None:
        start = time.perf_counter()
        if name == "resnet18":
            fit(net, *images.training(30000, 64), epochs=2, seed=0, batch=96, rate=0.08)
            fit(net, *images.training(2000, 224), epochs=1, seed=0, batch=32, rate=0.03)
        else:
            x, y = images.training(400, 224)
            for part in x[:64].split(16):  # running statistics that fit the images
                net.train()(part)
            fit_head(net.eval(), list(net.modules())[-1], x, y)  # type: ignore[arg-type]
        x, y = images(128, seed=0), sets.load(images.root, "cifar10", "test", 128).labelled()[1]
        with torch.no_grad():
            right = torch.cat([net.eval()(part).argmax(1) for part in x.split(16)]) == y
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s, accuracy {right.float().mean():.2f}", file=sys.stderr)

    return cache.weights(
        folder / f"{name}.pt", NETWORKS[name](10), {"network": name, "set": "cifar10"}, learn
    )


@torch.no_grad()
def fit_head(net: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Ridge regression of the labels on an untrained network's last features, scaled to logits of deviation 3.

    The ridge is stronger than the features' variance: directions in which images hardly differ, where rounding is
    a large part of what they differ in, stay out of the logits, as they do in a trained network.
    """
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in x.split(8):
        net(part)
    hook.remove()
    features = torch.cat(seen).double()
    mean = features.mean(0)
    centred = features - mean
    targets = nn.functional.one_hot(y, head.out_features).double() - 1 / head.out_features
    gram = centred.T @ centred
    ridge = 10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, centred.T @ targets).T
    weight *= 3 / (centred @ weight.T).std()
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ mean)
