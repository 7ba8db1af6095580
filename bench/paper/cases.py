"""The cases that several tables share, by the paths that `bench.paper.subject.Subject` knows."""

from __future__ import annotations

from bench.paper.data.attacks import ATTACKS

#: Other sets that a network of a set is shown.
STRANGERS = {
    "cifar10": ("cifar100", "tinyimagenet", "svhn", "textures"),
    "mnist": ("scenes", "fashion", "letters", "kuzushiji", "omniglot"),
}
#: Some of every kind, for the tables that compare across kinds.
MIXED = {
    "attacks": tuple(f"attack/{name}" for name in ATTACKS),
    "other sets": tuple(f"ood/{name}" for name in STRANGERS["cifar10"]),
    "corruptions": tuple(
        f"corruption/{name}/3"
        for name in ("gaussian_noise", "defocus_blur", "fog", "brightness", "contrast", "jpeg_compression")
    ),
}
CASES = tuple(case for group in MIXED.values() for case in group)


def short(case: str) -> str:
    """A case's name without its kind."""
    return case.split("/")[1]
