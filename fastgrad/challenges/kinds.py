"""The kinds of challenge: what each does to images, how strongly and at which price, and whose turn it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fastgrad import checks
from fastgrad.challenges import attacks, corruptions

#: Steps of a projected gradient attack, and the share of inputs that are attacked where others are corrupted. Tuned on
#: photographs with EfficientNet-Lite0. AUROC of attacks after JPEG: 5 steps .877, 10 steps .894; attacks on .25 of the
#: inputs .868, on .3 .877, on .4 .895, but then a ResNet-20 loses .01 on unseen corruptions. Without one-step attacks,
#: photographs would lose nothing, and a ResNet-20 .02 on near sets.
STEPS, ATTACKED = 10, 0.3
#: Cost of a gradient at the image, in forward passes: forward, and backward without weight gradients.
_GRADIENT = 2.4
_T = TypeVar("_T")


class Challenges(NamedTuple):
    """A batch of challenging inputs.

    Attributes:
        inputs: ``(B, ...)``, in the form of the clean inputs.
        kinds: The kind of each, a key of `CHALLENGES`, or of `TOKEN_CHALLENGES` in `fastgrad.challenges.tokens`.
        sources: ``(B,)``, which of the clean inputs each was made from.
    """

    inputs: Any
    kinds: list[str]
    sources: Tensor


class Kind(NamedTuple):
    """One kind of challenge.

    Attributes:
        strengths: Mild to severe: shares of the unit range, pixels, JPEG quality, grid cells.
        family: Kinds of one family resemble each other: what finds one finds the others.
        function: Maps unit images, strength and generator to altered images; an attack also takes the model.
        passes: Forward passes per image; 0 for a kind that needs no model.
        jpeg: Whether JPEG compression follows, which removes most of an attack's traces in the pixels.
    """

    strengths: tuple[float, ...]
    family: str
    function: Callable[..., Tensor]
    passes: float = 0.0
    jpeg: bool = False


_EPSILONS = (2 / 255, 4 / 255, 8 / 255)
_pgd = functools.partial(attacks.pgd, steps=STEPS)

#: Every kind of challenge by name; a kind is one row.
CHALLENGES: Mapping[str, Kind] = MappingProxyType(
    {
        "noise": Kind((0.04, 0.10, 0.20), "grain", corruptions.noise),
        "blur": Kind((0.7, 1.2, 2.0), "blur", corruptions.blur),
        "contrast": Kind((0.6, 0.35, 0.15), "light", corruptions.contrast),
        "compression": Kind((40, 20, 8), "grain", corruptions.compression),
        "brightness": Kind((0.15, 0.3, 0.45), "light", corruptions.brightness),
        "shuffle": Kind((2, 4, 8), "layout", corruptions.shuffle),
        "inversion": Kind((1.0,), "light", corruptions.inversion),
        "mixture": Kind((0.25, 0.4, 0.5), "layout", corruptions.mixture),
        "phase": Kind((0.3, 0.6, 1.0), "texture", corruptions.phase),
        "magnification": Kind((3, 5, 8), "blur", corruptions.magnification),
        "tiling": Kind((2, 4), "layout", corruptions.tiling),
        "fgsm": Kind(_EPSILONS, "grain", attacks.fgsm, _GRADIENT),
        "pgd": Kind(_EPSILONS, "grain", _pgd, 1 + STEPS * _GRADIENT),
        "compressed_fgsm": Kind(_EPSILONS, "grain", attacks.fgsm, _GRADIENT, jpeg=True),
        "compressed_pgd": Kind(_EPSILONS, "grain", _pgd, 1 + STEPS * _GRADIENT, jpeg=True),
    }
)


def challenge_names(names: Sequence[str] | None = None) -> list[str]:
    """Return full names such as ``"noise-2"`` (kind and severity; 1 is the mildest).

    Args:
        names: kinds (``"noise"``: all its severities) or full names; None for every kind.

    Raises:
        TypeError: ``names`` is not a sequence.
        ValueError: A name is neither (the message lists those that exist).
    """
    if names is not None and (isinstance(names, str) or not isinstance(names, Iterable)):
        raise TypeError(f"names must be a sequence; it was {names!r}")
    full: list[str] = []
    for name in CHALLENGES if names is None else names:
        kind, _, level = str(name).partition("-")
        checks.one_of("names", kind, CHALLENGES)
        levels = [f"{kind}-{n}" for n in range(1, len(CHALLENGES[kind].strengths) + 1)]
        if level:
            checks.one_of("names", name, levels)
        full += [name] if level else levels
    return full


def challenge_cost(each: int = 3, *, names: Sequence[str] | None = None) -> float:
    """Return how many forward passes per clean input it takes to make ``each`` challenges and to read them."""
    checks.at_least(1, each=each)
    attacked, _, share = turns_of(challenge_names(names))
    passes = 0.0
    for turn in range(len(attacked)):
        made: dict[Any, float] = {}
        for kind, strength in map(row_of, kinds_for(attacked, turn, each)):
            # As in `generate._altered`, JPEG reuses the attack just made if the strength is the same.
            if not kind.jpeg or made.get(kind.function) != strength:
                passes += kind.passes
            made[kind.function] = strength
    return each + share * passes / max(1, len(attacked))


def row_of(name: str) -> tuple[Kind, float]:
    """Return the kind and strength of a full name."""
    kind, _, level = name.partition("-")
    return CHALLENGES[kind], CHALLENGES[kind].strengths[int(level) - 1]


def turns_of(full: Sequence[str]) -> tuple[list[str], list[str], float]:
    """Return the names of attacks in the order in which inputs get them, the others, and the share of inputs attacked.

    An attack costs many passes and JPEG none, so each attack is used once as it is, and twice through JPEG.
    """
    attacked = [name for name in full for _ in range(1 + row_of(name)[0].jpeg) if row_of(name)[0].passes]
    attacked.sort(key=lambda name: (name.rpartition("_")[2], row_of(name)[0].jpeg))
    others = [name for name in full if not row_of(name)[0].passes]
    return attacked, others, ATTACKED if attacked and others else float(bool(attacked))


def kinds_for(kinds: Sequence[_T], turn: int, each: int) -> list[_T]:
    """Return the ``each`` kinds of the input whose turn it is."""
    return [kinds[place % len(kinds)] for place in range(turn * each, (turn + 1) * each)]
