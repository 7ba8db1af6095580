"""Challenging inputs made from a network and its clean images, or from clean token ids, to fit detectors on."""

from __future__ import annotations

from fastgrad.challenges.attacks import fgsm, pgd
from fastgrad.challenges.generate import generate_challenges
from fastgrad.challenges.kinds import CHALLENGES, Challenges, Kind, challenge_cost, challenge_names
from fastgrad.challenges.pixels import PixelRange

__all__ = [
    "CHALLENGES",
    "Challenges",
    "Kind",
    "PixelRange",
    "challenge_cost",
    "challenge_names",
    "fgsm",
    "generate_challenges",
    "pgd",
]
