"""The exported networks and the images they are shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.data import photographs, sets
from bench.detection.train import fit

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
NETWORKS = ("resnet18", "resnet50", "efficientnet_lite0", "vit_b_16")


class Images:
    """Images of CIFAR-10, normalized and enlarged."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, count: int, seed: int) -> Tensor:
        """Return ``(count, 3, 224, 224)``: test images from number ``50 * seed`` on."""
        return prepared(sets.load(self.root, "cifar10", "test", count, 50 * seed).tensor())

    def held_out(self, count: int) -> Tensor:
        """Return clean images that the network was not trained on, to fit the detector."""
        return prepared(sets.load(self.root, "cifar10", "train", count, -5000).tensor())

    def training(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Return images to train on and their labels."""
        x, y = sets.load(self.root, "cifar10", "train", count).labelled()
        return prepared(x, size), y


class Photographs(Images):
    """Photographs, pixels in [0, 1]."""

    def __call__(self, count: int, seed: int) -> Tensor:
        """Return ``(count, 3, 224, 224)``."""
        return self._some(50 * seed, count)

    def held_out(self, count: int) -> Tensor:
        """Return images that no other batch holds."""
        return self._some(-count, count)

    def _some(self, start: int, count: int) -> Tensor:
        images = photographs.photographs(self.root).images
        order = np.roll(np.random.default_rng(0).permutation(len(images)), -start)
        return sets.to_tensor(images[order[:count]]).contiguous()


def prepared(pixels: Tensor, size: int = 224) -> Tensor:
    """Return normalized, resized, contiguous images: in another memory layout the live model's sums differ in order."""
    normalized = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    return nn.functional.interpolate(normalized, (size, size), mode="bilinear").contiguous()


def network(name: str, root: Path, folder: Path) -> tuple[nn.Module, Images]:
    """Return a network and its images: with published weights, or made to know CIFAR-10 and kept in ``folder``."""
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        return photographs.network(pixels=True).eval(), Photographs(root)
    import torchvision.models

    images = Images(root)

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
        x, y = images(128, seed=0), sets.load(root, "cifar10", "test", 128).labelled()[1]
        with torch.no_grad():
            right = torch.cat([net.eval()(part).argmax(1) for part in x.split(16)]) == y
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s, accuracy {right.float().mean():.2f}", file=sys.stderr)

    net = torchvision.models.get_model(name, num_classes=10)
    return cache.weights(folder / f"{name}.pt", net, {"network": name, "set": "cifar10"}, learn), images


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
