"""What is refused: the message names the argument."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bad_arguments import Refused, refused
from small_images import photos, small_net
from small_nets import Net
from torch import Generator

from fastgrad.challenges import PixelRange, challenge_cost, fgsm, generate_challenges, pgd


def made(**given: Any) -> Any:
    return generate_challenges(**{"model": small_net(), "images": photos(), **given})


def attacked(attack: Any, **given: Any) -> Any:
    arguments = {"model": small_net(), "unit": photos(), "epsilon": 0.1, "generator": Generator()}
    return attack(**{**arguments, "pixels": PixelRange.of(photos(), clip=(0, 1)), **given})


#: Of both attacks.
ATTACKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": print}, TypeError, "model must be a Module"),
    ({"unit": [0.5]}, TypeError, "unit must be a torch.Tensor"),
    ({"unit": torch.zeros(3, 8, 8)}, ValueError, "unit must have shape"),
    ({"unit": 255 * photos()}, ValueError, r"unit must lie in \[0, 1\] .*; it reached \["),
    ({"unit": photos() - torch.nan}, ValueError, "unit must be finite"),
    ({"epsilon": "8/255"}, TypeError, "epsilon must be a number"),
    ({"epsilon": torch.tensor(8)}, TypeError, "epsilon must have a floating dtype"),
    ({"epsilon": -0.1}, ValueError, "epsilon must not be negative"),
    ({"pixels": (0, 1)}, TypeError, "pixels must be a PixelRange"),
]
ONE = torch.zeros(1)
BAD: list[Refused] = [
    (lambda: made(names=["fog"]), ValueError, "names must be one of"),
    (lambda: made(names=["noise-9"]), ValueError, "noise-9"),
    (lambda: made(names="noise"), TypeError, "sequence"),
    (lambda: made(names=[3]), ValueError, "names must be one of .* it was '3'"),
    (lambda: PixelRange.of(photos(), clip=(1, 0)), ValueError, "clip"),
    (lambda: PixelRange.of(photos(), mean=[0.5] * 3), ValueError, "together"),
    (lambda: PixelRange.of(photos(), mean=[0.5], std=[0.5]), ValueError, "per channel"),
    (lambda: PixelRange.of(photos(), mean=[0.5] * 3, std=[0.0] * 3), ValueError, "std"),
    (lambda: made(batch_size=0), ValueError, "batch_size"),
    (lambda: made(seed="x"), ValueError, "seed must be an integer of at least 0; it was 'x'"),
    (lambda: made(model=None), ValueError, "compressed_fgsm, compressed_pgd, fgsm, pgd; it was None"),
    (lambda: made(model="resnet"), TypeError, "model"),
    (lambda: made(images=torch.zeros(3, 8, 8)), ValueError, "B, C, H, W"),
    (lambda: made(images=torch.zeros(2, 3, 0, 8)), ValueError, "B, C, H, W"),
    (lambda: made(images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "images"),
    (lambda: made(images=torch.full((1, 3, 8, 8), torch.nan)), ValueError, "finite"),
    (lambda: made(images=torch.ones(1, 3, 8, 8, device="meta")), ValueError, "images must be dense and hold values"),
    (lambda: made(images=torch.ones(1, 3, 8, 8).to_sparse()), ValueError, "images must be dense .* torch.sparse_coo"),
    (
        lambda: list(made(model=Net(lambda net, x: net.net(x)[0], net=small_net()), names=["pgd-2"])),
        ValueError, r"must return logits of shape \(B, N\); it returned \(4,\)",
    ),
    (lambda: attacked(pgd, steps=0), ValueError, "steps must be an integer of at least 1; it was 0"),
    (lambda: attacked(pgd, generator=0), TypeError, "generator must be a Generator; it was int"),
    (lambda: made(names=[]), ValueError, "names must"),
    (lambda: made(first=1.5), ValueError, "first must"),
    (lambda: made(seed=None), ValueError, "seed must"),
    (lambda: made(each=0), ValueError, "each must"),
    (lambda: made(pixels=(0, 1)), TypeError, "pixels must"),
    (lambda: made(images=photos() / 0, pixels=PixelRange.of(photos())), ValueError, "images must be finite"),
    (lambda: challenge_cost(0), ValueError, "each must be an integer of at least 1; it was 0"),
    (lambda: PixelRange(1, 0), TypeError, "low must be a torch.Tensor"),
    (lambda: PixelRange(ONE, 1.0), TypeError, "high must be a torch.Tensor"),
    (lambda: PixelRange(ONE, torch.ones(3)), ValueError, r"high must have shape \(1,\)"),
    (lambda: PixelRange(torch.zeros(3), torch.tensor([1.0, 0, 1])), ValueError, "low must be below high everywhere"),
    *((partial(attacked, attack, **given), *said) for attack in (fgsm, pgd) for given, *said in ATTACKS),
]  # fmt: skip


test_bad_arguments = refused(BAD)
