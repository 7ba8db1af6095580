"""Scores of the published detectors that see no challenges; higher is less reliable.

Their hyper-parameters are those of their papers or of pytorch-ood's defaults, fixed before any test image was seen.
From pytorch-ood come those that it has and that apply; GradNorm (Huang et al., 2021) in closed form, NAC (Liu et al.,
2024), AdaSCALE (Regmi, 2025) and GROOD (Elaraby et al., 2023) are compact forms. pytorch-ood's NAC has other bins than
those that its authors' hyper-parameters are for. GROOD's prototype of other images is the mean of uniform
noise: a further data set, as its paper has it, is what nobody here is given. GradUncertainty reads the last layer, as
OpenOOD has it; that of the whole network, scored from clean images, is this package's *gradients one-class*. Of
pytorch-ood's detectors three do not apply: MCD needs a network with dropout, MCM one of images and texts, WeightedEBO
one that was trained on other images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.paper.coverage import CIFAR10, Coverage
from bench.paper.networks import Classifier
from fastgrad.scores.mahalanobis import Mahalanobis

Scores = NDArray[np.float64]
FromBlocks = Callable[[Mapping[str, Any]], Scores]
FromImages = Callable[[Tensor], Scores]
#: AdaSCALE-A for ResNet-50: percentiles, shares of features left and moved, weight of the latter, share of pixels,
#: step.
_PERCENTILES, _SHARES, _SHIFT, _PIXELS, _STEP = (80.0, 85.0), (0.05, 0.01), 10.0, 0.05, 0.5


def from_outputs(
    fit: Mapping[str, Tensor],
    layer: nn.Linear,
    labels: Tensor | None = None,
    noise: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, FromBlocks]:
    """Detectors that read logits and h alone, fitted on those of clean images.

    Without ``labels``, as of photographs that show each class once at most, those that fit something to every class
    are left out, and *Mahalanobis* fits one Gaussian to all, its covariance shrunk (Ledoit and Wolf, 2004); KNN counts
    fewer neighbours, and ViM keeps a quarter as many directions as there are images.

    Args:
        fit: ``logits`` ``(n, N)`` and ``features`` ``(n, D)``.
        layer: The last one.
        labels: Classes ``(n,)``.
        noise: Features ``(m, D)`` of uniform noise.
        names: Of those that are fitted; None for all.
    """
    from pytorch_ood import detector as ood

    h, logits = fit["features"], fit["logits"]
    known = torch.zeros(len(h), dtype=torch.long) if labels is None else labels
    weight, bias, identity = layer.weight.detach(), layer.bias.detach(), nn.Identity()

    def head(values: Tensor) -> Tensor:
        return values.flatten(1) @ weight.T + bias

    by_logits: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": ood.MaxSoftmax.score,
        "energy": ood.EnergyBased.score,
        "MaxLogit": ood.MaxLogit.score,
        "entropy": ood.Entropy.score,
        "GEN": partial(ood.GEN.score, M=min(100, logits.shape[1])),
        "KLMatching": ood.KLMatching(None).fit_logits(logits).predict_logits,
    }
    fitted: dict[str, Any] = {
        "KNN": ood.KNN(None, k=10 if labels is None else 50),
        "ViM": ood.ViM(None, min(h.shape[1] // 2, len(h) // 4), weight, bias),
        "DICE": ood.DICE(None, weight, bias, p=0.9),
        "NCI": ood.NCI(None, layer, alpha=0.0001),
        "fDBD": ood.fDBD(None, layer),
        "NNGuide": ood.NNGuide(None, head),
        "PNML": ood.PNML(None, head),
    }
    if labels is not None:
        fitted |= {
            "Mahalanobis": ood.Mahalanobis(None),
            "relative Mahalanobis": ood.RMD(None),
            "SHE": ood.SHE(None, head),
            "GMM": ood.GMM(None),
        }
        for name, of_logits in (
            ("temperature", ood.TemperatureScaling(None)),
            ("OpenMax", ood.OpenMax(None)),
        ):
            if names is None or name in names:
                with torch.enable_grad():
                    of_logits.fit_logits(logits, labels)
                by_logits[name] = of_logits.predict_logits
    by_features: dict[str, Callable[[Tensor], Tensor]] = {"LTS": ood.LTS(None, head).predict_features}
    for name, detector in fitted.items():
        if names is None or name in names:
            detector.fit_features(h, known)
            by_features[name] = detector.predict_features
    for name, kind in (("ReAct", ood.ReAct), ("ASH", ood.ASH), ("SCALE", ood.SCALE), ("VRA", ood.VRA)):
        detector = kind(identity, head)
        detector.fit_feature_maps(h[:, :, None, None], known)
        by_features[name] = partial(_of_maps, detector)
    if labels is None:
        mahalanobis = Mahalanobis.fit(h.double().numpy())
        by_features["Mahalanobis"] = lambda values: mahalanobis(values.double())
    if labels is not None and noise is not None:
        by_features["GROOD"] = grood(h, labels, noise)
    by_features["GradNorm"] = lambda values: (
        -((head(values).softmax(1) - 1 / len(bias)).abs().sum(1) * values.abs().sum(1))
    )

    def of(block: str, score: Callable[[Tensor], Tensor]) -> FromBlocks:
        return lambda blocks: score(torch.as_tensor(blocks[block])).detach().double().numpy()

    found = {name: of("logits", score) for name, score in by_logits.items()} | {
        name: of("features", score) for name, score in by_features.items()
    }
    return {name: score for name, score in found.items() if names is None or name in names}


def _of_maps(detector: Any, values: Tensor) -> Tensor:
    return detector.predict_feature_maps(values[:, :, None, None])  # type: ignore[no-any-return]


def grood(h: Tensor, labels: Tensor, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """Distance of the loss's gradient, by the prototype of other images, to the nearest gradient of a known image.

    The loss is cross-entropy over minus the distances to the classes' means and to that prototype.
    """
    means = torch.stack([h[labels == label].mean(0) for label in labels.unique()])
    prototypes = torch.cat([means, noise.mean(0, keepdim=True)])

    def gradients(values: Tensor) -> Tensor:
        distance = torch.cdist(values, prototypes)
        share = (-distance).softmax(1)[:, -1:]
        return share * (values - prototypes[-1]) / distance[:, -1:].clamp(min=1e-12)

    bank = gradients(h)
    return lambda values: torch.cdist(gradients(values), bank).amin(1)


def from_images(model: nn.Module, movement: Tensor, batch: int) -> dict[str, FromImages]:
    """ODIN and AdaSCALE, which need gradients of the image; ``movement`` is that of clean images (`movements`)."""
    from pytorch_ood.detector import ODIN

    return {
        "ODIN": in_batches(ODIN(model).predict, batch),
        "AdaSCALE": in_batches(partial(adascale, model, known=movement), batch),
    }


def from_layers(
    model: Classifier, images: Tensor, labels: Tensor, seen: tuple[Sequence[Tensor], Tensor], batch: int
) -> dict[str, FromImages]:
    """Detectors that read several layers, maps or gradients, fitted on images that the network was trained on.

    Args:
        model: The network.
        images: ``(n, C, H, W)``, for those that read more than spatial means.
        labels: Their classes.
        seen: Spatial means after the stem and every stage, and labels, of those images or more.
        batch: Images at a time.
    """
    from pytorch_ood import detector as ood

    stages = [nn.Sequential(model.normalize, model.stem), *model.stages]
    head = nn.Sequential(model.pool, nn.Flatten(), model.fc)
    torch.manual_seed(0)
    gram = ood.Gram(head, stages, model.fc.out_features, [1, 2, 3, 4, 5])
    gram.fit(list(zip(images.split(batch), labels.split(batch), strict=True)))
    nac = Coverage(model, [model.pool, *reversed(model.stages[:-1])], CIFAR10)
    nac.fit(images, batch)
    several = ood.MultiMahalanobis(stages)
    several.fit_structured(list(seen[0]), seen[1])
    moved = ood.MahalanobisODIN(model.features)
    moved.fit_features(seen[0][-1], seen[1])
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "NAC": nac,
        "Gram": gram.predict,
        "RankFeat": torch.no_grad()(ood.RankFeat(nn.Sequential(*stages), head).predict),
        "MultiMahalanobis": lambda x: several.predict_structured(model.stage_features(x)),
        "Mahalanobis, ODIN": moved.predict,
        "GradUncertainty": ood.GradUncertainty(model, lambda name: name.startswith("fc.")).predict,
    }
    return {name: in_batches(predict, batch) for name, predict in found.items()}


def in_batches(predict: Callable[[Tensor], Tensor], batch: int) -> FromImages:
    return lambda images: torch.cat([predict(x) for x in images.split(batch)]).detach().double().numpy()


def movements(model: nn.Module, images: Tensor, batch: int) -> NDArray[np.float32]:
    """How far the features of clean images move, which AdaSCALE knows ``(n,)``."""
    return torch.cat([_movement(*_perturbed(model, x)) for x in images.split(batch)]).numpy()


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
