"""The six attacks of the adversarial table, made by foolbox (Rauber et al. 2020)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

#: L-infinity radius of the gradient attacks in the unit range.
EPSILON = 8 / 255
ATTACKS = ("FGSM", "BIM", "C&W", "PGD", "IterLL", "Semantic")


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, name: str, *, seed: int, thorough: bool
) -> Tensor:
    """Attacked copies of ``images`` ``(B, C, H, W)`` in [0, 1], which the network classifies as ``labels``.

    FGSM (Goodfellow et al. 2015), BIM and IterLL (Kurakin et al. 2017; IterLL steps towards the least likely
    class), C&W with the L2 norm (Carlini and Wagner 2017), PGD (Madry et al. 2018) and Semantic, the negative
    of the image (Hosseini et al. 2017).
    """
    with warnings.catch_warnings():
        # foolbox imports a version helper that setuptools has deprecated.
        warnings.simplefilter("ignore")
        import foolbox

    torch.manual_seed(seed)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    criterion = foolbox.criteria.Misclassification(labels)
    steps, search = (100, 5) if thorough else (30, 2)
    if name == "IterLL":
        with torch.no_grad():
            criterion = foolbox.criteria.TargetedMisclassification(model(images).argmin(1))
    method = {
        "FGSM": lambda: foolbox.attacks.LinfFastGradientAttack(),
        "BIM": lambda: foolbox.attacks.LinfBasicIterativeAttack(steps=10),
        "IterLL": lambda: foolbox.attacks.LinfBasicIterativeAttack(steps=10),
        "PGD": lambda: foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25),
        "C&W": lambda: foolbox.attacks.L2CarliniWagnerAttack(search, steps, 0.05, initial_const=0.1),
        "Semantic": lambda: foolbox.attacks.InversionAttack(),
    }[name]()
    bounded = name in ("FGSM", "BIM", "IterLL", "PGD")
    _, attacked, _ = method(wrapped, images, criterion, epsilons=EPSILON if bounded else None)
    return attacked.detach()
