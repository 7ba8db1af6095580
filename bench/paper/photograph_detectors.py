"""The published detectors on the photographs; higher is less reliable.

Their hyper-parameters are those of their papers or of pytorch-ood's defaults, fixed before any test image was seen.
From pytorch-ood come those that it has; NAC (Liu et al., 2024) and AdaSCALE (Regmi, 2025) are compact forms. Detectors
that fit a Gaussian to every class do not apply, since the photographs that detectors are fitted on show each class once
at most: *Mahalanobis* fits one to all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Scores = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
_BATCH = 16
#: AdaSCALE-A for ResNet-50: percentiles, shares of features left and moved, weight of the latter, share of pixels,
#: step.
_PERCENTILES, _SHARES, _SHIFT, _PIXELS, _STEP = (80.0, 85.0), (0.05, 0.01), 10.0, 0.05, 0.5
#: NAC's bins, steepness and samples that fill a bin, of which there are fewer where few images are at hand.
_BINS, _STEEPNESS = 50, 100.0


def from_outputs(
    fit: Mapping[str, Tensor], weight: Tensor, bias: Tensor
) -> dict[str, Callable[[Mapping[str, Any]], Scores]]:
    """Detectors that read logits and h alone, fitted on those of clean photographs.

    Args:
        fit: ``logits`` ``(n, N)`` and ``features`` ``(n, D)``.
        weight: Of the last layer ``(N, D)``.
        bias: Of the last layer ``(N,)``.
    """
    from pytorch_ood.detector import ASH, GEN, KNN, SCALE, EnergyBased, Mahalanobis, MaxSoftmax, ReAct, ViM

    h, one_class = fit["features"], torch.zeros(len(fit["features"]), dtype=torch.long)
    maps = h[:, :, None, None]

    def head(values: Tensor) -> Tensor:
        return values.flatten(1) @ weight.T + bias

    vim, knn, mahalanobis = ViM(None, h.shape[1] // 2, weight, bias), KNN(None), Mahalanobis(None)
    for detector in (vim, knn, mahalanobis):
        detector.fit_features(h, one_class)
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
        "Mahalanobis": of("features", mahalanobis.predict_features),
        "ReAct": of("features", shaped(react)),
        "ASH": of("features", shaped(ash)),
        "SCALE": of("features", shaped(scale)),
    }


def reference(model: nn.Module, images: Tensor) -> Arrays:
    """What NAC and AdaSCALE know of clean photographs: states of neurons, and how far features move."""
    layers = _layers(model)
    states: dict[str, list[Tensor]] = {name: [] for name in layers}
    moved = []
    for x in images.split(_BATCH):
        for name, value in zip(layers, _states(model, x, list(layers.values())), strict=True):
            states[name].append(value)
        moved.append(_movement(*_perturbed(model, x)[:2]))
    counts = {f"states {name}": _histogram(torch.cat(values)).numpy() for name, values in states.items()}
    return counts | {"movement": torch.cat(moved).numpy()}


def from_images(model: nn.Module, known: Mapping[str, NDArray[Any]], images: Tensor) -> Arrays:
    """Scores ``(n,)`` of ODIN, NAC and AdaSCALE, which need gradients."""
    from pytorch_ood.detector import ODIN

    odin, layers = ODIN(model), _layers(model)
    found: dict[str, list[Tensor]] = {"ODIN": [], "NAC": [], "AdaSCALE": []}
    for x in images.split(_BATCH):
        found["ODIN"].append(odin.predict(x))
        states = _states(model, x, list(layers.values()))
        counts = [torch.from_numpy(known[f"states {name}"]) for name in layers]
        found["NAC"].append(-sum(map(_coverage, states, counts), torch.zeros(len(x))))
        found["AdaSCALE"].append(_adascale(model, x, torch.from_numpy(known["movement"])))
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def last_linear(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Where NAC looks: the outputs of the last four stages, which are those of the last blocks before a stride."""
    blocks = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "MBConvBlock"]
    return dict(blocks[index] for index in (4, 10, 14, 15))


def _states(model: nn.Module, x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """``sigmoid(a z dKL/dz)`` ``(B, C)`` of the divergence from the uniform distribution, means over positions."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in layers]
    try:
        with torch.enable_grad():
            logits = model(x.detach().requires_grad_())
            divergence = -logits.log_softmax(1).mean(1).sum()
            slopes = torch.autograd.grad(divergence, seen)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        torch.sigmoid(_STEEPNESS * (z.detach() * slope).mean((2, 3)))
        for z, slope in zip(seen, slopes, strict=True)
    ]


def _bins(states: Tensor) -> Tensor:
    return (states * _BINS).long().clamp(0, _BINS - 1)


def _histogram(states: Tensor) -> Tensor:
    """How many of the samples ``(n, C)`` are in each bin, ``(C, bins)``."""
    return nn.functional.one_hot(_bins(states), _BINS).sum(0)


def _coverage(states: Tensor, counts: Tensor) -> Tensor:
    """How well the states ``(B, C)`` are covered by those of clean samples, means over neurons."""
    filled = max(1, int(counts[0].sum()) // _BINS)
    return counts.gather(1, _bins(states).T).T.float().div(filled).clamp(max=1).mean(1)


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


def _adascale(model: nn.Module, x: Tensor, known: Tensor) -> Tensor:
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
