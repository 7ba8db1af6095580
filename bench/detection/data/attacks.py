"""The attacks of the tables, made by foolbox (Rauber et al. 2020)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, name: str, *, seed: int, epsilon: float = 8 / 255,
    carlini: tuple[int, int, float, float] = (2, 30, 0.05, 0.1), confidence: float = 0.0,
    deepfool: tuple[int, int] = (20, 10),
) -> Tensor:  # fmt: skip
    """Return attacked copies of ``images`` ``(B, C, H, W)`` in [0, 1], which the network classifies as ``labels``.

    FGSM (Goodfellow et al. 2015), BIM and IterLL (Kurakin et al. 2017; IterLL steps towards the least likely
    class), C&W with the L2 norm (Carlini and Wagner 2017), PGD (Madry et al. 2018), DeepFool with the L2 norm
    towards the likeliest classes (Moosavi-Dezfooli et al. 2016) and Semantic, the negative of the image
    (Hosseini et al. 2017). ``epsilon`` is the L-infinity radius, if the attack has one; ``carlini`` are searches,
    steps, step size and first constant, ``confidence`` by how much another logit exceeds the label's; ``deepfool`` are
    steps and classes. ``seed`` seeds PGD's start.
    """
    with warnings.catch_warnings():
        # foolbox imports a version helper that setuptools has deprecated.
        warnings.simplefilter("ignore")
        import foolbox

    torch.manual_seed(seed)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    criterion = foolbox.criteria.Misclassification(labels)
    if name == "IterLL":
        with torch.no_grad():
            criterion = foolbox.criteria.TargetedMisclassification(model(images).argmin(1))
    method = {
        "FGSM": lambda: foolbox.attacks.LinfFastGradientAttack(),
        "BIM": lambda: foolbox.attacks.LinfBasicIterativeAttack(steps=10),
        "IterLL": lambda: foolbox.attacks.LinfBasicIterativeAttack(steps=10),
        "PGD": lambda: foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25),
        "C&W": lambda: foolbox.attacks.L2CarliniWagnerAttack(*carlini[:3], confidence, initial_const=carlini[3]),
        "DeepFool": lambda: foolbox.attacks.L2DeepFoolAttack(steps=deepfool[0], candidates=deepfool[1]),
        "Semantic": lambda: foolbox.attacks.InversionAttack(),
    }[name]()
    bound = epsilon if name in ("FGSM", "BIM", "IterLL", "PGD") else None
    _, attacked, _ = method(wrapped, images, criterion, epsilons=bound)
    return attacked.detach()
