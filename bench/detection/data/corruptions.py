"""Common corruptions (Hendrycks and Dietterich 2019), by imagecorruptions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.detection.data.sets import to_bytes, to_tensor


def corrupt(images: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Corrupted copies of colour ``images`` ``(B, 3, H, W)`` in [0, 1].

    The strengths are those of ImageNet-C, made for images of 224 pixels: on 32 pixels blurs and weather weigh
    more than in CIFAR-10-C.
    """
    import imagecorruptions

    # The library draws from NumPy's global generator.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        made = [imagecorruptions.corrupt(image, severity, name) for image in to_bytes(images)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return to_tensor(np.stack(made).astype(np.uint8)) if made else torch.empty_like(images)
