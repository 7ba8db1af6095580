"""The tables: which networks, which cases in which groups, which protocols, which figure of merit."""

from __future__ import annotations

from dataclasses import dataclass

from bench.detection.registry import CASES, Protocol

BOTH = (Protocol.CLEAN, Protocol.GENERATED)


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: Of the page.
        networks: Keys of the registry.
        groups: Of cases, in order; a control enters no mean.
        protocols: Blocks of methods.
        merit: ``auroc`` of clean against other images, or ``aurc``, the mean error over all shares of answers kept.
        methods: Of these alone; none for all.
        text: What is said above.
    """

    title: str
    networks: tuple[str, ...]
    groups: tuple[str, ...]
    protocols: tuple[Protocol, ...] = BOTH
    merit: str = "auroc"
    methods: tuple[str, ...] = ()
    text: str = ""

    def cases(self, kind: str) -> list[str]:
        """Return the names of the cases that there are of a kind of data."""
        return [name for name, case in CASES.items() if case.group in self.groups and kind in case.kinds]


LITE = ("lite0", "lite1", "lite2")
CIFAR = ("resnet18", "densenet-bc")
ALIKE, UNALIKE = "corruptions like generated ones", "corruptions unlike generated ones"
SELECTIVE = (
    "softmax", "entropy", "margin", "energy", "MaxLogit", "GEN", "pNormSoftmax", "GradTrust", "TemperatureScaling",
    "KNN", "ViM", "fastgrad, clean only", "fastgrad, budget 1.2", "fastgrad, budget 2.5",
)  # fmt: skip

TABLES = {
    "photographs": Table(
        "Unusual photographs",
        LITE,
        (
            "attacks",
            "attacks after JPEG",
            "other sets",
            ALIKE,
            UNALIKE,
            "control",
        ),
    ),
    "other-sets": Table(
        "Other data sets",
        (*CIFAR, "news"),
        ("near sets", "far sets", "other texts", "changed texts", "control"),
    ),
    "attacks": Table("Attacks", CIFAR, ("attacks", "attacks after JPEG", "control")),
    "corruptions": Table("Corruptions", CIFAR, (ALIKE, UNALIKE)),
    "failure": Table(
        "Which answers to leave out",
        ("lite0", "resnet18", "news"),
        (ALIKE, UNALIKE, "changed texts"),
        merit="aurc",
        methods=SELECTIVE,
        text="Area under the risk-coverage curve: the mean error over all shares of answers that are kept. Lower is "
        "better. Clean images and each corruption of a group together.",
    ),
    "labelled": Table("Labelled attacks", CIFAR, ("attacks",), (Protocol.LABELLED,)),
}
