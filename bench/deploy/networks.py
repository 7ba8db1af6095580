"""The exported networks and the images they are shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.data import photographs, sets
from bench.detection.train import accuracy, fit

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
NETWORKS = ("resnet18", "resnet50", "efficientnet_lite0", "vit_b_16")
#: Clean images to fit a detector on.
FITTED_ON = 160
#: Returns so many test images ``(n, 3, 224, 224)``, from the one of a number on.
Images = Callable[[int, int], Tensor]


def photographed(root: Path, count: int, start: int) -> Tensor:
    """Return photographs, pixels in [0, 1], in random order; those before number 0 are the last ones."""
    images = photographs.photographs(root).images
    order = np.roll(np.random.default_rng(0).permutation(len(images)), -start)
    return sets.to_tensor(images[order[:count]]).contiguous()


def small(root: Path, part: str, count: int, start: int) -> Tensor:
    """Return images of CIFAR-10, normalized and enlarged."""
    return prepared(sets.to_tensor(sets.load(root, "cifar10", part, count, start).images))


def prepared(pixels: Tensor, size: int = 224) -> Tensor:
    """Return normalized, resized, contiguous images: in another memory layout the live model's sums differ in order."""
    normalized = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    return nn.functional.interpolate(normalized, (size, size), mode="bilinear").contiguous()


def network(name: str, root: Path, folder: Path) -> tuple[nn.Module, Images, Tensor]:
    """Return a network, its test images, and clean ones that it was not trained on.

    The weights are published ones, or made to know CIFAR-10 and kept in ``folder``.
    """
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        images = partial(photographed, root)
        return photographs.network(pixels=True).eval(), images, images(FITTED_ON, -FITTED_ON)
    import torchvision.models

    def learn(net: Any) -> None:
        def labelled(part: str, count: int, size: int) -> tuple[Tensor, Tensor]:
            x, y = sets.load(root, "cifar10", part, count).labelled()
            return prepared(x, size), y

        start = time.perf_counter()
        if name == "resnet18":
            fit(net, *labelled("train", 30000, 64), epochs=2, seed=0, batch=96, rate=0.08)
            fit(net, *labelled("train", 2000, 224), epochs=1, seed=0, batch=32, rate=0.03)
        else:
            x, y = labelled("train", 400, 224)
            for part in x[:64].split(16):  # running statistics that fit the images
                net.train()(part)
            fit_head(net.eval(), list(net.modules())[-1], x, y)
        right, seconds = accuracy(net.eval(), *labelled("test", 128, 224)), time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s, accuracy {right:.2f}", file=sys.stderr)

    net = torchvision.models.get_model(name, num_classes=10)
    net = cache.weights(folder / f"{name}.pt", net, {"network": name, "set": "cifar10"}, learn)
    return net, partial(small, root, "test"), small(root, "train", FITTED_ON, -5000)


@torch.no_grad()
def fit_head(net: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Ridge regression of the labels on an untrained network's last features, scaled to logits of deviation 3.

    The ridge is stronger than the features' variance: directions in which images hardly differ, where rounding is
    a large part of what they differ in, stay out of the logits, as they do in a trained network.
    """
    from sklearn.linear_model import Ridge

    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in x.split(8):
        net(part)
    hook.remove()
    features = torch.cat(seen).double().numpy()
    ridge = Ridge(10 * len(features) * features.var(0).mean())
    weight = ridge.fit(features, nn.functional.one_hot(y, head.out_features).numpy()).coef_
    mean = features.mean(0)
    weight = weight * 3 / ((features - mean) @ weight.T).std(ddof=1)
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(-weight @ mean))
