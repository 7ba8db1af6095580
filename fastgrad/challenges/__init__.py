"""Challenging inputs made from a network and its clean images, for detectors that have seen nothing else."""

from __future__ import annotations

from fastgrad.challenges.attacks import deepfool, fgsm, pgd
from fastgrad.challenges.generate import (
    CHALLENGES,
    FAMILIES,
    challenge_names,
    generate_challenges,
    iter_challenges,
)
from fastgrad.challenges.pixels import PixelRange

__all__ = [
    "CHALLENGES",
    "FAMILIES",
    "PixelRange",
    "challenge_names",
    "deepfool",
    "fgsm",
    "generate_challenges",
    "iter_challenges",
    "pgd",
]
