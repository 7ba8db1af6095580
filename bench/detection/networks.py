"""The networks of the tables, each with the data that it knows."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from bench.detection.architectures import Classifier, dense_network
from bench.detection.data import news as data
from bench.detection.data import photographs, sets
from bench.detection.registry import PHOTOGRAPHS, SMALL, TEXTS, NotRun, Options, network
from bench.detection.subject import Subject
from bench.detection.train import EPOCHS, HELD_OUT, LONG, Recipe, trained

#: Photographs to fit and to test on, and images of a case: of each draw from the 1,000, and in quick mode.
DRAWS = ((600, 400, 120), (400, 200, 60), (400, 200, 60), (240, 160, 40))
QUICK = (240, 100, 24)
#: The same of CIFAR-10; draws are other images of one network.
CIFAR, CIFAR_QUICK = (1000, 500, 100), (800, 400, 60)
#: The same of news; fewer to fit on would leave the covariance of h, of 384 numbers, singular.
NEWS, NEWS_QUICK = (data.HELD_OUT, data.HELD_OUT, 300), (data.HELD_OUT, 300, 60)
#: The part of CIFAR-10 on whose last images detectors are fitted; the published network has seen all training images.
FITTED_ON = {"densenet": "test"}
#: A published network: its weights, and where each of them belongs in `dense_network`.
DENSENET = (
    "https://github.com/deeplearning-wisc/dice/raw/8acfb8d52eee997a7bf6f9d17ff5363fd91ba47b/"
    "checkpoints/CIFAR-10/densenet/checkpoint_100.pth.tar"
)
DENSENET_SHA256 = "deaefd082911a1c6c92aacdcfecf03c71b932acc5c08b779c85c44eccdc0c817"
PLACES = {
    "conv1.": "stem.", "block1.layer.": "stages.0.0.", "trans1.": "stages.0.1.", "block2.layer.": "stages.1.0.",
    "trans2.": "stages.1.1.", "block3.layer.": "stages.2.0.", "bn1.": "stages.2.1.", "fc.": "fc.",
}  # fmt: skip


def photographed(size: int, options: Options, draw: int) -> Subject:
    """EfficientNet-Lite with its published weights on a sample of the photographs; larger ones on one of their own."""
    count, test, case = QUICK if options.quick else DRAWS[draw]
    split = photographs.photographs(options.data)
    order = np.random.default_rng(draw if size == 0 else 3).permutation(len(split.images))
    assert split.labels is not None
    parts = {}
    for name, places in {"fit": order[:count], "test": order[count : count + test]}.items():
        labels = torch.from_numpy(split.labels[places])
        parts[name] = (sets.to_tensor(split.images[places]), labels)
    model = photographs.network(pixels=True, size=size).requires_grad_(False).to(memory_format=torch.channels_last)
    stages = photographs.stages(model)
    network = f"lite{size}"
    return Subject(network, draw, model, parts, options.cache, stages, options.data, PHOTOGRAPHS, case, options.quick)


for _size, _tuned in ((0, True), (1, False), (2, False)):
    _title = f"EfficientNet-Lite{_size} on photographs"
    network(f"lite{_size}", _title, tuned=_tuned)(partial(photographed, _size))


@network("news", "all-MiniLM-L6-v2 on AG News")
def news(options: Options, draw: int) -> Subject:
    """A published sentence encoder with a linear layer; of draws other splits of the news."""
    source = data.News(options.data, options.cache, draw)
    count, test, case = NEWS_QUICK if options.quick else NEWS
    parts = {"fit": source.news("fit", count), "test": source.news("test", test)}
    model = source.model.requires_grad_(False)
    return Subject("news", draw, model, parts, options.cache, [], options.data, TEXTS, case, options.quick, source)


def published(folder: Path) -> Classifier:
    """DenseNet-BC of 100 layers with the weights of "DICE" (Sun and Li, ECCV 2022), kept in ``folder``.

    Raises:
        NotRun: They are not there and cannot be downloaded.
        ValueError: The file is not the one that was published; the message names it.
    """
    path = folder / "densenet-cifar10.pth.tar"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(DENSENET, str(path), progress=False)
        except OSError as why:
            raise NotRun(f"its weights are not in {path} and cannot be downloaded from {DENSENET} ({why})") from why
    if (found := sha256(path.read_bytes()).hexdigest()) != DENSENET_SHA256:
        raise ValueError(f"{path} must have the SHA-256 {DENSENET_SHA256}; it has {found}. Delete it")
    model = dense_network()
    weights = model.state_dict()
    for name, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
        head, rest = next((head, name[len(head) :]) for head in PLACES if name.startswith(head))
        weights[PLACES[head] + rest] = value
    model.load_state_dict(weights)
    return model.eval()


def small(name: str, options: Options, draw: int) -> Subject:
    """A network of CIFAR-10; detectors are fitted on images that it was not trained on."""
    count, test, case = CIFAR_QUICK if options.quick else CIFAR
    if name == "densenet":
        model = published(options.cache)
    else:
        recipe = Recipe(name, 0, EPOCHS[name])
        if options.quick and name in LONG and not (options.cache / recipe.file()).exists():
            raise NotRun("its training takes an hour or two on one core, and quick mode leaves it out")
        model = trained(recipe, options.data, options.cache)
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    fit = sets.load(options.data, "cifar10", FITTED_ON.get(name, "train"), count, draw * count - HELD_OUT)
    parts = {"fit": fit.labelled(), "test": sets.load(options.data, "cifar10", "test", test, draw * test).labelled()}
    stages = [model.stem, *model.stages]
    return Subject(name, draw, model, parts, options.cache, stages, options.data, SMALL, case, options.quick)


for _name, _title in (
    ("resnet18", "ResNet-18 on CIFAR-10"), ("resnet20", "ResNet-20 on CIFAR-10"),
    ("densenet", "DenseNet-BC on CIFAR-10, published weights"),
    ("resnet", "a small residual network on CIFAR-10 (smoke test)"),
):  # fmt: skip
    network(_name, _title)(partial(small, _name))
