"""Attacks, by foolbox (Rauber et al. 2020), and corruptions (Hendrycks and Dietterich 2019), by imagecorruptions."""

from __future__ import annotations

import warnings
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection.data.sets import to_bytes, to_tensor

#: L-infinity radius of the gradient attacks in the unit range.
EPSILON = 8 / 255
_BOUNDED = ("FGSM", "BIM", "IterLL", "PGD")


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    name: str,
    *,
    seed: int,
    epsilon: float = EPSILON,
    carlini: tuple[int, int, float, float] = (2, 30, 0.05, 0.1),
    deepfool: tuple[int, int] = (20, 10),
) -> Tensor:
    """Attacked copies of ``images`` ``(B, C, H, W)`` in [0, 1], which the network classifies as ``labels``.

    FGSM (Goodfellow et al. 2015), BIM and IterLL (Kurakin et al. 2017; IterLL steps towards the least likely
    class), C&W with the L2 norm (Carlini and Wagner 2017), PGD (Madry et al. 2018), DeepFool with the L2 norm
    towards the likeliest classes (Moosavi-Dezfooli et al. 2016) and Semantic, the negative of the image
    (Hosseini et al. 2017).

    Args:
        model: Classifier of images in [0, 1].
        images: What is attacked.
        labels: Classes ``(B,)`` to lead away from.
        name: One of those above.
        seed: Of PGD's start.
        epsilon: L-infinity radius, where the attack has one.
        carlini: Searches, steps, step size and first constant of C&W.
        deepfool: Steps and classes of DeepFool.
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
        "C&W": lambda: foolbox.attacks.L2CarliniWagnerAttack(*carlini[:3], initial_const=carlini[3]),
        "DeepFool": lambda: foolbox.attacks.L2DeepFoolAttack(steps=deepfool[0], candidates=deepfool[1]),
        "Semantic": lambda: foolbox.attacks.InversionAttack(),
    }[name]()
    _, attacked, _ = method(wrapped, images, criterion, epsilons=epsilon if name in _BOUNDED else None)
    return attacked.detach()


def corrupt(images: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Commonly corrupted copies of colour ``images`` ``(B, 3, H, W)`` in [0, 1].

    The strengths are those of ImageNet-C, made for images of 224 pixels: on 32 pixels blurs and weather weigh
    more than in CIFAR-10-C.
    """
    import imagecorruptions

    # The library draws from NumPy's global generator, and scikit-image in it from a new one.
    state, generator = np.random.get_state(), np.random.default_rng(seed)  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        with patch.object(np.random, "default_rng", lambda *_: generator):
            made = [imagecorruptions.corrupt(image, severity, name) for image in to_bytes(images)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return to_tensor(np.stack(made).astype(np.uint8)) if made else torch.empty_like(images)
