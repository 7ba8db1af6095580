"""The networks of the tables, each with the data that it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.detection.architectures import Classifier, dense_network, residual_network
from bench.detection.data import files, photographs, sets
from bench.detection.data import news as data
from bench.detection.experiment import FILES, PHOTOGRAPHS, SMALL, TEXTS, Experiment, NotRun, Options, read
from bench.detection.registry import network
from bench.detection.train import HELD_OUT, RECIPES, file, logistic_layer, trained

#: Photographs to fit and to test on, and images of a case: for each draw from the 1,000, and in quick mode.
DRAWS = ((600, 400, 120), (400, 200, 60), (400, 200, 60), (240, 160, 40))
QUICK = (240, 100, 24)
#: The same for CIFAR-10; draws are other images for one network.
CIFAR, CIFAR_QUICK = (1000, 500, 100), (800, 400, 60)
#: The same for news; with fewer to fit on, the covariance of h, which has 384 numbers, would be singular.
NEWS, NEWS_QUICK = (data.HELD_OUT, data.HELD_OUT, 300), (data.HELD_OUT, 300, 60)


class Published(NamedTuple):
    """Published weights: the file's URL and SHA-256, the untrained network, its prefixes of names by the file's."""

    url: str
    digest: str
    make: Callable[[], Classifier]
    places: Mapping[str, str]

    def load(self, path: Path) -> Classifier:
        """Return the network in evaluation mode, its weights kept in ``path``."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.url, str(path), progress=False)
            except OSError as why:
                raise NotRun(f"its weights are not in {path} and cannot be downloaded from {self.url} ({why})") from why
        if (found := sha256(path.read_bytes()).hexdigest()) != self.digest:
            raise ValueError(f"{path} must have the SHA-256 {self.digest}; it has {found}. Delete it")
        model = self.make()
        weights = model.state_dict()
        for name, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
            head, rest = next((head, name[len(head) :]) for head in self.places if name.startswith(head))
            weights[self.places[head] + rest] = value
        model.load_state_dict(weights)
        return model.eval()


_DICE = "https://github.com/deeplearning-wisc/dice/raw/8acfb8d52eee997a7bf6f9d17ff5363fd91ba47b/checkpoints/CIFAR-10"
_RESNETS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e8995e81e91ce6b1d69dcc98ad579b0b153"
PUBLISHED: Mapping[str, Published] = {
    # "DICE" (Sun and Li, ECCV 2022).
    "densenet": Published(
        f"{_DICE}/densenet/checkpoint_100.pth.tar",
        "deaefd082911a1c6c92aacdcfecf03c71b932acc5c08b779c85c44eccdc0c817",
        dense_network,
        {"conv1.": "stem.", "block1.layer.": "stages.0.0.", "trans1.": "stages.0.1.", "block2.layer.": "stages.1.0.",
         "trans2.": "stages.1.1.", "block3.layer.": "stages.2.0.", "bn1.": "stages.2.1.", "fc.": "fc."},
    ),
    # Idelbayev, "Proper ResNet implementation for CIFAR10/CIFAR100 in PyTorch" (2018).
    "resnet56": Published(
        f"{_RESNETS}/pretrained_models/resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        partial(
            residual_network, width=16, blocks=9, stride=1, padded=True,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        ),
        {"module.conv1.": "stem.0.", "module.bn1.": "stem.1.", "module.layer1.": "stages.0.",
         "module.layer2.": "stages.1.", "module.layer3.": "stages.2.", "module.linear.": "fc."},
    ),
}  # fmt: skip


def photographed(size: int, options: Options, draw: int) -> Experiment:
    """Return EfficientNet-Lite with its published weights on a sample of photographs, the same for all larger sizes."""
    count, test, case = QUICK if options.quick else DRAWS[draw]
    split = photographs.photographs(options.data)
    order = np.random.default_rng(draw if size == 0 else 3).permutation(len(split.images))
    parts = {"fit": split.at(order[:count]).labelled(), "test": split.at(order[count : count + test]).labelled()}
    model = photographs.network(size).requires_grad_(False).to(memory_format=torch.channels_last)
    return Experiment(f"lite{size}", draw, model, parts, options, PHOTOGRAPHS, case, photographs.stages(model))


for _size, _tuned in ((0, True), (1, True), (2, False)):
    _title = f"EfficientNet-Lite{_size} on photographs"
    network(f"lite{_size}", _title, tuned=_tuned)(partial(photographed, _size))


#: Ranges of ImageNet's classes: the class after the last of each range, and its kind.
RANGES = (
    (7, "cold"), (25, "bird"), (69, "cold"), (80, "spineless"), (101, "bird"), (107, "mammal"), (127, "spineless"),
    (147, "bird"), (151, "mammal"), (269, "dog"), (300, "mammal"), (330, "spineless"), (389, "mammal"), (398, "cold"),
    (924, "thing"), (970, "food"), (1000, "outdoors"),
)  # fmt: skip
#: Photographs that the layer for kinds is trained on, those to fit on and to test on.
KINDS = (400, 350, 250)


@network("kinds", "EfficientNet-Lite0 on eight kinds of photographs", tuned=True)
def kinds(options: Options, draw: int) -> Experiment:
    """Return a published network whose last layer is trained for few classes, each with many photographs."""
    own = photographed(0, options, 0)
    split = photographs.photographs(options.data)
    names = list(dict.fromkeys(name for _, name in RANGES))
    ends = np.searchsorted([end for end, _ in RANGES], split.labels, side="right")
    split = replace(split, labels=np.array([names.index(RANGES[place][1]) for place in ends]))
    order = np.random.default_rng(draw).permutation(len(split.images))
    layer, fit, test = (split.at(part).labelled() for part in np.split(order, np.cumsum(KINDS))[:3])
    own.model[-1]._fc = logistic_layer(torch.from_numpy(read(own, layer[0])["h"]), layer[1])
    return replace(own, network="kinds", draw=draw, parts={"fit": fit, "test": test})


@network("news", "all-MiniLM-L6-v2 on AG News", tuned=True)
def news(options: Options, draw: int) -> Experiment:
    """Return a published sentence encoder with a linear layer; draws are other splits of the news."""
    source = data.News(options.data, options.cache, draw)
    count, test, case = NEWS_QUICK if options.quick else NEWS
    parts = {"fit": source.news("fit", count), "test": source.news("test", test)}
    return Experiment("news", draw, source.model.requires_grad_(False), parts, options, TEXTS, case, source=source)


@network("magika", "Magika on files of this installation")
def magika(options: Options, draw: int) -> Experiment:
    """Return a published network that tells kinds of files apart; draws are other splits of the folders."""
    source = files.Files(draw)
    parts = {part: source.files(part, NEWS[0]) for part in ("fit", "test")}
    count = (NEWS_QUICK if options.quick else NEWS)[2]
    return Experiment("magika", draw, source.model.requires_grad_(False), parts, options, FILES, count, source=source)


def unseen(name: str) -> str:
    """Return the part of CIFAR-10 on whose last images detectors are fitted; published networks have seen the other."""
    return "test" if name in PUBLISHED else "train"


def small(name: str, options: Options, draw: int) -> Experiment:
    """Return a network of CIFAR-10; detectors are fitted on images that it was not trained on."""
    count, test, case = CIFAR_QUICK if options.quick else CIFAR
    if name in PUBLISHED:
        model = PUBLISHED[name].load(options.cache / f"{name}-cifar10.pth.tar")
    else:
        if options.quick and RECIPES[name].long and not file(name, 0, options.cache).exists():
            raise NotRun("its training takes hours on one core, and quick mode leaves it out")
        model = trained(name, 0, options.data, options.cache)
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    fit = sets.load(options.data, "cifar10", unseen(name), count, draw * count - HELD_OUT)
    parts = {"fit": fit.labelled(), "test": sets.load(options.data, "cifar10", "test", test, draw * test).labelled()}
    return Experiment(name, draw, model, parts, options, SMALL, case, [model.stem, *model.stages])


for _name, _title in (
    ("resnet18", "ResNet-18 on CIFAR-10"), ("resnet20", "ResNet-20 on CIFAR-10"),
    ("resnet56", "ResNet-56 on CIFAR-10, published weights"), ("resnet", "a small residual network on CIFAR-10"),
    ("densenet", "DenseNet-BC on CIFAR-10, published weights"), ("vit", "a vision transformer fine-tuned on CIFAR-10"),
):  # fmt: skip
    network(_name, _title, tuned=_name == "resnet20")(partial(small, _name))


@network("resnet56-training", "ResNet-56 on CIFAR-10, detectors fitted on all of its training images")
def on_training_images(options: Options, draw: int) -> Experiment:
    """Return a network whose detectors are fitted on its training images, as in their publications."""
    own = small("resnet56", options, draw)
    parts = {**own.parts, "fit": sets.load(options.data, "cifar10", "train").labelled()}
    return replace(own, network="resnet56-training", parts=parts)


def attacked(name: str, count: int, options: Options, draw: int) -> Experiment:
    """Return a network with images of each attack for detectors that are trained on them."""
    own = small(name, options, draw)
    return replace(own, network=f"{name}-attacked", count=own.count if options.quick else count)


for _name, _title, _count in (("resnet", "a small residual network", 300), ("densenet", "DenseNet-BC", 60)):
    _title = f"{_title} on CIFAR-10, {_count} images of each attack"
    network(f"{_name}-attacked", _title)(partial(attacked, _name, _count))
