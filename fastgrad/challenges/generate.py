"""Generate challenges, reproducible by a seed, from a model and clean images alone."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastgrad import checks
from fastgrad.challenges import corruptions
from fastgrad.challenges.kinds import Challenges, challenge_names, kinds_for, row_of, turns_of
from fastgrad.challenges.pixels import PixelRange, check_images

#: Values in a batch of images that is altered together on a CPU; on other devices eight times as many.
_NUMBERS = 1 << 21
#: A challenge is left out if no pixel changes by more than this share of the range, half a level of a byte.
_UNCHANGED = 1 / 510
#: Lowest and highest JPEG quality that cameras and websites use; attacks survive it, most of their traces do not.
_QUALITIES = (60, 95)


def generate_challenges(
    model: nn.Module | None,
    images: Tensor,
    *,
    each: int = 3,
    names: Sequence[str] | None = None,
    first: int = 0,
    seed: int = 0,
    pixels: PixelRange | None = None,
    batch_size: int | None = None,
) -> Iterator[Challenges]:
    """Yield ``each`` challenges of every clean input, in batches of mixed kinds.

    Kinds take turns over the inputs, so that a few inputs cover all of them. A challenge that equals its clean input,
    such as a blurred flat image, is left out. Everything is checked before the first batch is made. The model is run in
    evaluation mode and left as it was.

    Args:
        model: classifier ``(B, C, H, W) -> (B, N)`` logits; None if ``names`` has no attack.
        images: clean images ``(B, C, H, W)``, any floating dtype, any normalisation.
        each: challenges per clean input; those of an attacked input are all attacks.
        names: kinds or full names (see :func:`challenge_names`); None for every kind.
        first: number of clean inputs in earlier calls, from which the turns of kinds and ``sources`` continue.
        seed: same seed, same kinds; with the same ``batch_size`` and calls, same challenges.
        pixels: range of the images; None to read it from ``images``, which must then be the whole sample.
        batch_size: images at a time; None for what fits the device's caches.

    Raises:
        TypeError: ``images`` is not floating, or ``model`` is not a module.
        ValueError: Names are unknown, shapes are wrong, images are not finite, or an attack has no model.
    """
    full = challenge_names(names)
    _check(model, images, full, batch_size)
    checks.at_least(1, each=each)
    checks.at_least(0, first=first, seed=seed)
    if not full:
        raise ValueError("names must hold at least one challenge; it was empty")
    if pixels is None:
        pixels = PixelRange.of(images)
    checks.is_a(PixelRange, pixels=pixels)
    attacked, others, share = turns_of(full)
    order = torch.randperm(len(others), generator=Generator().manual_seed(int(seed)), device="cpu")
    others = [others[place] for place in order]
    groups: defaultdict[Any, list[tuple[int, str]]] = defaultdict(list)
    for number in range(first, first + len(images)):
        before = int(share * number)
        under_attack = int(share * (number + 1)) > before
        turn = kinds_for(attacked, before, each) if under_attack else kinds_for(others, number - before, each)
        for name in turn:
            # All strengths of an attack are made together.
            groups[row_of(name)[0].function if under_attack else name].append((number - first, name))
    size, images = int(batch_size or _fitting(images)), images.detach()

    def batches() -> Iterator[Challenges]:
        made: list[Tensor] = []
        kinds: list[str] = []
        sources: list[int] = []
        for group in groups.values():
            for start in range(0, len(group), size):
                wanted = group[start : start + size]
                place, name = wanted[0]
                altered = _altered(model, images, wanted, f"{seed}/{first + place}/{name}", pixels, size)
                clean = images[[place for place, _ in wanted]].clamp(pixels.low, pixels.high)
                moved = (altered - clean).abs() > _UNCHANGED * (pixels.high - pixels.low)
                changed = moved.flatten(1).any(1)
                made.append(altered[changed])
                kept = [pair for pair, new in zip(wanted, changed.tolist(), strict=True) if new]
                kinds += [name.partition("-")[0] for _, name in kept]
                sources += [first + place for place, _ in kept]
                # Groups of few images wait for others: a network is slow on small batches.
                if len(kinds) >= size:
                    yield Challenges(torch.cat(made), kinds, torch.tensor(sources, device="cpu"))
                    made, kinds, sources = [], [], []
        if kinds:
            yield Challenges(torch.cat(made), kinds, torch.tensor(sources, device="cpu"))

    return batches()


@torch.inference_mode(False)
def _altered(
    model: nn.Module | None, images: Tensor, wanted: Sequence[tuple[int, str]], draw: str, pixels: PixelRange, size: int
) -> Tensor:
    """Alter images at the ``wanted`` places by one kind or one attack, ``size`` at a time; ``draw`` is the seed."""
    generator = Generator().manual_seed(zlib.crc32(draw.encode()))
    rows = [row_of(name) for _, name in wanted]
    own = [(place, strength) for (place, _), (_, strength) in zip(wanted, rows, strict=True)]
    through = torch.tensor([kind.jpeg for kind, _ in rows], device="cpu")
    # JPEG takes the attacked image before it in the list if that has the same input and strength.
    begun = ~through | torch.tensor([i == 0 or own[i] != own[i - 1] for i in range(len(own))], device="cpu")
    chosen = [pair for pair, new in zip(own, begun.tolist(), strict=True) if new]
    unit = pixels.to_unit(images[torch.tensor([place for place, _ in chosen], device=images.device)])
    function = rows[0][0].function
    if not rows[0][0].passes:
        made = function(unit, chosen[0][1], generator).clamp(0, 1)
    else:
        assert model is not None  # checked before
        strengths = unit.new_tensor([strength for _, strength in chosen]).view(-1, 1, 1, 1)
        pairs = zip(unit.split(size), strengths.split(size), strict=True)
        made = torch.cat([function(model, x, own, generator, pixels=pixels) for x, own in pairs])
        made = made[begun.cumsum(0).to(made.device) - 1]
        low, high = _QUALITIES
        qualities = torch.randint(low, high + 1, (len(made),), generator=generator, device="cpu")
        if through.any():
            made[through] = corruptions.compression(made[through], qualities[through], generator)
    # Rounding may put white slightly above its value.
    return pixels.from_unit(made).clamp(pixels.low, pixels.high)


def _check(model: nn.Module | None, images: Tensor, names: Sequence[str], batch_size: int | None) -> None:
    check_images(images)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None; it was {type(model).__name__}")
    needing = sorted({name.partition("-")[0] for name in names if row_of(name)[0].passes})
    if model is None and needing:
        raise ValueError(f"model must be given for {', '.join(needing)}; it was None")
    if model is not None and needing and any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"model must hold tensors that gradients pass for {', '.join(needing)}; it was made in inference "
            "mode: give copy.deepcopy(model), made outside of it"
        )
    if batch_size is not None:
        checks.at_least(1, batch_size=batch_size)


def _fitting(images: Tensor) -> int:
    """Return how many images to alter at a time."""
    numbers = _NUMBERS if images.device.type == "cpu" else 8 * _NUMBERS
    return max(8, min(256, numbers // max(1, images[:1].numel())))
