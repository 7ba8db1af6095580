"""Common corruptions (Hendrycks and Dietterich 2019), by imagecorruptions."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.detection.data.sets import to_bytes, to_tensor


def corrupt(images: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Return corrupted copies of colour ``images`` ``(B, 3, H, W)`` in [0, 1].

    The strengths are those of ImageNet-C, made for images of 224 pixels: on 32 pixels blurs and weather are stronger
    than in CIFAR-10-C.
    """
    import imagecorruptions

    # The library draws from NumPy's global generator, and scikit-image, which it calls, from a new one.
    state, generator = np.random.get_state(), np.random.default_rng(seed)  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        with patch.object(np.random, "default_rng", lambda *_: generator):
            made = [imagecorruptions.corrupt(image, severity, name) for image in to_bytes(images)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return to_tensor(np.stack(made).astype(np.uint8)) if made else torch.empty_like(images)
