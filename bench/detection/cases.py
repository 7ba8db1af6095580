"""The cases: attacks, the same after JPEG, other sets, corruptions, and controls.

Images of an attack come from clean images that the network classifies rightly. They are rounded to whole grey levels,
as a file of images holds them, and only those that mislead the network then count.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from bench.detection.data import files, news, sets
from bench.detection.data.attacks import attack
from bench.detection.data.corruptions import corrupt
from bench.detection.data.photographs import stranger
from bench.detection.experiment import BATCH, FILES, IMAGES, PHOTOGRAPHS, SMALL, TEXTS, Experiment, Shown, packed
from bench.detection.registry import case

AFTER = " after JPEG"
#: Attacks on photographs: smaller radii than on CIFAR-10, because the images are larger.
PHOTOGRAPHED: Mapping[str, Mapping[str, Any]] = {
    "FGSM 2/255": {"name": "FGSM", "epsilon": 2 / 255},
    "PGD 2/255": {"name": "PGD", "epsilon": 2 / 255},
    "PGD 8/255": {"name": "PGD", "epsilon": 8 / 255},
    "BIM 4/255": {"name": "BIM", "epsilon": 4 / 255},
    "C&W": {"name": "C&W", "carlini": (3, 40, 0.01, 1.0)},
    "DeepFool": {"name": "DeepFool"},
}
#: Settings of attacks in quick mode.
BRIEF: Mapping[str, Mapping[str, Any]] = {"C&W": {"carlini": (1, 20, 0.03, 1.0)}, "DeepFool": {"deepfool": (4, 4)}}
#: Attacks on CIFAR-10, at a radius of 8/255. Names of cases are unique, so two say what they differ in.
TESTED: Mapping[str, Mapping[str, Any]] = {
    **{name: {"name": name} for name in ("FGSM", "BIM", "PGD", "IterLL", "Semantic")},
    **{f"{name} on CIFAR-10": {"name": name} for name in ("C&W", "DeepFool")},
}
#: The same with other strengths, for the question whether strength explains the figures of *Probing the Purview*.
STRENGTHS: Mapping[str, Mapping[str, Any]] = {
    "FGSM 16/255 on CIFAR-10": {"name": "FGSM", "epsilon": 16 / 255},
    "FGSM 32/255 on CIFAR-10": {"name": "FGSM", "epsilon": 32 / 255},
    "C&W of confidence 10 on CIFAR-10": {"name": "C&W", "carlini": (3, 40, 0.05, 1.0), "confidence": 10.0},
}
OTHER_STRENGTHS = "attacks of other strengths"
#: Kinds that `fastgrad.challenges` generates in a form of its own, and kinds unlike those that it generates.
FAMILIAR = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast",
            "jpeg_compression")  # fmt: skip
FAMILIAR_TEXTS, FAMILIAR_FILES = ("dropped words", "shuffled words"), ("flipped bytes",)
FOREIGN = ("frost", "fog", "snow", "spatter", "pixelate", "elastic_transform", "saturate", "motion_blur")
#: Groups of changed inputs, of familiar kinds and of others, and groups of inputs of no class.
ALIKE, UNALIKE = "corruptions like generated ones", "corruptions unlike generated ones"
CHANGED_TEXTS = ("changed texts like generated ones", "changed texts unlike generated ones")
CHANGED_FILES = ("changed files like generated ones", "changed files unlike generated ones")
STRANGE = ("other sets", "near sets", "far sets", "other texts", "foreign files")
#: Other sets for photographs, and near and far ones for CIFAR-10 as in OpenOOD.
STRANGERS = {"textures": "large textures", "CIFAR-100": "cifar100", "grey scenes": "scenes", "letters": "letters"}
NEAR, FAR = ("cifar100", "tinyimagenet"), ("svhn", "textures")


def _seed(experiment: Experiment, *words: str) -> int:
    return zlib.crc32("/".join((str(experiment.draw), *words)).encode()) % 2**31


def attacked(name: str, how: Mapping[str, Any], jpeg: bool, experiment: Experiment, part: str, count: int) -> Shown:
    """Return attacked images that mislead the network, as they are or after JPEG."""
    places = experiment.right[part][:count]
    clean, labels = (value[places] for value in experiment.parts[part])
    how = {**how, **BRIEF.get(how["name"], {})} if experiment.options.quick else how

    def make() -> dict[str, NDArray[Any]]:
        parts = [
            attack(experiment.model, packed(x), y, seed=_seed(experiment, name, part), **how)
            for x, y in zip(clean.split(BATCH), labels.split(BATCH), strict=True)
        ]
        return {"images": sets.to_bytes(torch.cat(parts))}

    images = sets.to_tensor(experiment.kept(f"images/{name}/{part}", make)["images"])
    images = sets.compress(images) if jpeg else images
    misled = torch.cat([experiment.model(x).argmax(1) for x in packed(images).split(BATCH)]) != labels
    return Shown(images[misled], places[misled])


def corrupted(name: str, severity: int, experiment: Experiment, part: str, count: int) -> Shown:
    clean = experiment.parts[part][0][:count]

    def make() -> dict[str, NDArray[Any]]:
        return {"images": sets.to_bytes(corrupt(clean, name, severity, seed=_seed(experiment, name, part)))}

    images = sets.to_tensor(experiment.kept(f"images/{name}-{severity}/{part}", make)["images"])
    return Shown(images, torch.arange(len(images)))


def other(name: str, experiment: Experiment, part: str, count: int) -> Shown:
    """Return images of another set, different ones for each draw."""
    start = experiment.draw * count
    if experiment.few:
        images = stranger(experiment.options.data, name, count, start)
    else:
        like = sets.load(experiment.options.data, "cifar10", "test", 1)
        images = sets.stranger(experiment.options.data, name, like, count, start)
    return Shown(images, torch.full((len(images),), -1))


for _kind, _attacks in ((PHOTOGRAPHS, PHOTOGRAPHED), (SMALL, TESTED)):
    for _name, _how in _attacks.items():
        case(_name, "attacks", (_kind,))(partial(attacked, _name, _how, False))
        case(_name + AFTER, "attacks" + AFTER, (_kind,))(partial(attacked, _name, _how, True))
for _name, _how in STRENGTHS.items():
    case(_name, OTHER_STRENGTHS, (SMALL,))(partial(attacked, _name, _how, False))
for _names, _group in ((FAMILIAR, ALIKE), (FOREIGN, UNALIKE)):
    for _name in _names:
        case(_name, _group, IMAGES)(partial(corrupted, _name, 2))
for _title, _name in STRANGERS.items():
    case(f"{_title}, enlarged", "other sets", (PHOTOGRAPHS,))(partial(other, _name))
for _group, _sets in (("near sets", NEAR), ("far sets", FAR)):
    for _name in _sets:
        case(_name, _group, (SMALL,))(partial(other, _name))


def from_source(name: str, experiment: Experiment, part: str, count: int) -> Shown:
    """Return other texts or files, or changed ones, whose labels stay."""
    return Shown(*experiment.source.case(name, part, count))


for _name in (*news.CASES, *news.CORRUPTED):
    _group = "other texts" if _name in news.CASES else CHANGED_TEXTS[_name not in FAMILIAR_TEXTS]
    case(_name, _group, (TEXTS,))(partial(from_source, _name))
for _name in (*files.CHANGED, *files.DISGUISED, *files.UNKNOWN):
    _group = CHANGED_FILES[_name not in FAMILIAR_FILES] if _name in files.CHANGED else "foreign files"
    case(_name, _group, (FILES,))(partial(from_source, _name))


@case("JPEG, not attacked", "control", IMAGES)
def compressed(experiment: Experiment, part: str, count: int) -> Shown:
    """Return clean images after the compression of attacked ones, to measure its effect alone."""
    images = sets.compress(experiment.parts[part][0][:count])
    return Shown(images, torch.arange(len(images)))
