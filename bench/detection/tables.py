"""The tables: their networks, groups of cases and protocols."""

from __future__ import annotations

from typing import NamedTuple

from bench.detection.cases import ALIKE, CHANGED_FILES, CHANGED_TEXTS, OTHER_STRENGTHS, UNALIKE
from bench.detection.registry import Protocol


class Table(NamedTuple):
    """The AUROC of clean against other images, by network, group of cases and protocol; a control enters no mean."""

    title: str
    networks: tuple[str, ...]
    groups: tuple[str, ...]
    protocols: tuple[Protocol, ...] = (Protocol.CLEAN, Protocol.GENERATED)


LITE = ("lite0", "lite1", "lite2")
CIFAR = ("resnet20", "resnet18", "resnet56", "densenet", "vit")

TABLES = {
    "photographs": Table(
        "Unusual photographs", LITE, ("attacks", "attacks after JPEG", "other sets", ALIKE, UNALIKE, "control")
    ),
    "other-sets": Table(
        "Other data sets",
        (*CIFAR, "resnet56-training", "resnet", "news", "magika"),
        ("near sets", "far sets", "other texts", *CHANGED_TEXTS, "foreign files", *CHANGED_FILES, "control"),
    ),
    "attacks": Table("Attacks", CIFAR, ("attacks", "attacks after JPEG", "control")),
    "corruptions": Table("Corruptions", CIFAR, (ALIKE, UNALIKE)),
    "labelled": Table("Labelled attacks", CIFAR, ("attacks",), (Protocol.LABELLED,)),
    "purview": Table(
        "Probing the Purview, its own table",
        ("resnet-attacked", "densenet-attacked"),
        ("attacks",),
        (Protocol.LABELLED,),
    ),
    "purview-strengths": Table(
        "Probing the Purview, other strengths", ("resnet-attacked",), (OTHER_STRENGTHS,), (Protocol.LABELLED,)
    ),
}
