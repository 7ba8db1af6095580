"""The published detectors on the photographs; higher is less reliable.

Their hyper-parameters are those of their papers or of pytorch-ood's defaults, fixed before any test image was seen.
From pytorch-ood come those that it has; AdaSCALE (Regmi, 2025) is a compact form. Some need more photographs than
there are: those that fit a Gaussian to every class see each class once at most, so that *Mahalanobis* fits one to all,
its covariance shrunk (Ledoit and Wolf, 2004), since h has more columns than there are photographs; ViM keeps a quarter
as many directions as photographs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.scores.mahalanobis import Mahalanobis

Scores = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
_BATCH = 16
#: AdaSCALE-A for ResNet-50: percentiles, shares of features left and moved, weight of the latter, share of pixels,
#: step.
_PERCENTILES, _SHARES, _SHIFT, _PIXELS, _STEP = (80.0, 85.0), (0.05, 0.01), 10.0, 0.05, 0.5


def from_outputs(
    fit: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Callable[[Mapping[str, Any]], Scores]]:
    """Detectors that read logits and h alone, fitted on those of clean photographs.

    Args:
        fit: ``logits`` ``(n, N)`` and ``features`` ``(n, D)``.
        weight: Of the last layer ``(N, D)``.
        bias: Of the last layer ``(N,)``.
    """
    from pytorch_ood.detector import ASH, GEN, KNN, SCALE, EnergyBased, MaxSoftmax, ReAct, ViM

    h, one_class = fit["features"], torch.zeros(len(fit["features"]), dtype=torch.long)
    maps = h[:, :, None, None]

    def head(values: Tensor) -> Tensor:
        return values.flatten(1) @ weight.T + bias

    vim, knn = ViM(None, min(h.shape[1] // 2, len(h) // 4), weight, bias), KNN(None, k=10)
    for detector in (vim, knn):
        detector.fit_features(h, one_class)
    mahalanobis = Mahalanobis.fit(h.double().numpy())
    react = ReAct(nn.Identity(), head)
    react.fit_feature_maps(maps, one_class)
    ash, scale = ASH(nn.Identity(), head), SCALE(nn.Identity(), head)

    def of(name: str, score: Callable[[Tensor], Tensor]) -> Callable[[Mapping[str, Any]], Scores]:
        return lambda blocks: score(torch.as_tensor(blocks[name])).detach().double().numpy()

    def shaped(detector: Any) -> Callable[[Tensor], Tensor]:
        return lambda values: detector.predict_feature_maps(values[:, :, None, None])

    return {
        "softmax": of("logits", MaxSoftmax.score),
        "energy": of("logits", EnergyBased.score),
        "GEN": of("logits", functools.partial(GEN.score, M=100)),
        "KNN": of("features", knn.predict_features),
        "ViM": of("features", vim.predict_features),
        "Mahalanobis": of("features", lambda values: mahalanobis(values.double())),
        "ReAct": of("features", shaped(react)),
        "ASH": of("features", shaped(ash)),
        "SCALE": of("features", shaped(scale)),
    }


def reference(model: nn.Module, images: Tensor) -> Arrays:
    """What AdaSCALE knows of clean photographs: how far their features move."""
    moved = [_movement(*_perturbed(model, x)) for x in images.split(_BATCH)]
    return {"movement": torch.cat(moved).numpy()}


def from_images(model: nn.Module, known: Mapping[str, NDArray[Any]], images: Tensor) -> Arrays:
    """Scores ``(n,)`` of ODIN and AdaSCALE, which need gradients."""
    from pytorch_ood.detector import ODIN

    odin, movement = ODIN(model), torch.from_numpy(known["movement"])
    found: dict[str, list[Tensor]] = {"ODIN": [], "AdaSCALE": []}
    for x in images.split(_BATCH):
        found["ODIN"].append(odin.predict(x))
        found["AdaSCALE"].append(adascale(model, x, movement))
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def last_linear(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _perturbed(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features h ``(B, D)``, and those of the images with the pixels moved that matter least to the predicted logit."""
    seen: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
        flat = slope.reshape(len(x), -1)
        least = flat.abs().topk(int(_PIXELS * flat.shape[1]), largest=False).indices
        # The step is in units of the network's normalised input, whose deviation is about half of [0, 1].
        step = torch.zeros_like(flat).scatter_(1, least, 0.5 * _STEP * flat.gather(1, least).sign())
        with torch.no_grad():
            model(x + step.view_as(slope))
    finally:
        hook.remove()
    return seen[0], seen[1]


def _movement(h: Tensor, other: Tensor) -> Tensor:
    """How far the largest features moved, and what is left of them, ``(B,)``."""
    few, more = (max(1, int(share * h.shape[1])) for share in _SHARES)
    left = other.relu().gather(1, h.topk(few).indices).sum(1)
    return left + _SHIFT * (h - other).abs().gather(1, h.topk(more).indices).sum(1)


def adascale(model: nn.Module, x: Tensor, known: Tensor) -> Tensor:
    """Minus the energy of features scaled the more, the less they moved."""
    h, other = _perturbed(model, x)
    rank = torch.searchsorted(known.sort().values, _movement(h, other), right=True) / len(known)
    low, high = _PERCENTILES
    percentile = low + (1 - rank) * (high - low)
    positive = h.relu()
    keep = (h.shape[1] - (h.shape[1] * percentile / 100).round()).long().clamp(min=1)
    ordered = positive.sort(1, descending=True).values
    top = ordered.cumsum(1).gather(1, keep[:, None] - 1)
    scale = (positive.sum(1, keepdim=True) / top).exp()
    layer = last_linear(model)
    with torch.no_grad():
        return -layer(h * scale).logsumexp(1)
