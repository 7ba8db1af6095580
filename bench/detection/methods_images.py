"""Published detectors that need the images: gradients of the input, several layers, or gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import fastgrad
from bench.detection.coverage import CIFAR10, IMAGENET, Coverage
from bench.detection.registry import Protocol, Score, method
from bench.detection.subject import BATCH, Fit, Seen

#: AdaSCALE-A for ResNet-50: percentiles, shares of features left and moved, weight of the latter, share of pixels,
#: step.
_PERCENTILES, _SHARES, _SHIFT, _PIXELS, _STEP = (80.0, 85.0), (0.05, 0.01), 10.0, 0.05, 0.5


Columns = Callable[..., Callable[[Seen], Tensor]]


def _batched(predict: Callable[[Tensor], Tensor]) -> Score:
    def score(seen: Seen) -> Tensor:
        return torch.cat([predict(x).detach() for x in seen.images.split(BATCH)])

    return score


@method("ODIN", 2018, "Liang et al., ICLR", slow=True)
def odin(fit: Fit) -> Score:
    from pytorch_ood.detector import ODIN

    return _batched(ODIN(fit.model).predict)


@method("NAC", 2024, "Liu et al., ICLR; bins of its authors", slow=True)
def nac(fit: Fit) -> Score:
    deepest = [module for module in fit.model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)][-1]
    places = IMAGENET if fit.subject.few else CIFAR10
    coverage = Coverage(fit.model, [deepest, *reversed(fit.subject.stages[:-1])], places)
    coverage.fit(fit.clean.images, BATCH)
    return _batched(coverage)


@method("GradUncertainty", 2020, "Lee and AlRegib, ICIP; the last layer, as in OpenOOD", slow=True)
def grad_uncertainty(fit: Fit) -> Score:
    from pytorch_ood.detector import GradUncertainty

    names = [name for name, module in fit.model.named_modules() if module is fit.layer]
    return _batched(GradUncertainty(fit.model, lambda name: name.startswith(f"{names[0]}.")).predict)


@method("gradient norms", 2022, "Lee et al.: all parameters, scored from clean data by a Gaussian", slow=True)
def gradient_norms(fit: Fit) -> Score:
    norms = _norms(fit)
    clean = norms(fit.clean)
    from fastgrad.scores.mahalanobis import Mahalanobis

    gaussian = Mahalanobis.fit(clean.double().numpy())
    return lambda seen: gaussian(norms(seen).double())


def _norms(fit: Fit) -> Callable[[Seen], Tensor]:
    """Logarithms of the squared norm of every parameter's gradient ``(n, P)``."""
    model = fit.model
    extractor = fastgrad.GradientFeatures(model, loss="bce", target="ones")

    def norms(seen: Seen) -> Tensor:
        def make() -> dict[str, np.ndarray]:
            model.requires_grad_(True)
            try:
                parts = [extractor(x)[1] for x in seen.images.split(BATCH)]
            finally:
                model.requires_grad_(False)
            return {"norms": torch.cat(parts).clamp_min(1e-30).log().float().numpy()}

        return torch.from_numpy(fit.subject.kept(f"gradients/{seen.case}/{seen.part}", make)["norms"])

    return norms


@method("AdaSCALE", 2025, "Regmi, arXiv; a compact form of AdaSCALE-A", slow=True)
def adascale(fit: Fit) -> Score:
    model, layer = fit.model, fit.layer
    known = torch.cat([_movement(*_perturbed(model, layer, x)) for x in fit.clean.images[:200].split(BATCH)])
    return _batched(partial(_adascale, model, layer, known))


def _perturbed(model: nn.Module, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features h ``(B, D)``, and those of the images with the pixels moved that matter least to the predicted logit."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
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


def _adascale(model: nn.Module, layer: nn.Linear, known: Tensor, x: Tensor) -> Tensor:
    """Minus the energy of features scaled the more, the less they moved."""
    h, other = _perturbed(model, layer, x)
    rank = torch.searchsorted(known.sort().values, _movement(h, other), right=True) / len(known)
    low, high = _PERCENTILES
    percentile = low + (1 - rank) * (high - low)
    positive = h.relu()
    keep = (h.shape[1] - (h.shape[1] * percentile / 100).round()).long().clamp(min=1)
    ordered = positive.sort(1, descending=True).values
    top = ordered.cumsum(1).gather(1, keep[:, None] - 1)
    scale = (positive.sum(1, keepdim=True) / top).exp()
    with torch.no_grad():
        return -layer(h * scale).logsumexp(1)


@method("MultiMahalanobis", 2018, "Lee et al., NeurIPS: every stage")
def several_stages(fit: Fit) -> Score:
    from pytorch_ood.detector import MultiMahalanobis

    made = MultiMahalanobis([nn.Identity() for _ in fit.clean.stages])
    made.fit_structured(fit.clean.stages, fit.labels)
    return lambda seen: made.predict_structured(seen.stages)


def logistic(clean: Tensor, other: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the score of a logistic regression, of standardised columns and both classes weighing the same."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = torch.cat([clean, other]).double().nan_to_num().numpy()
    labels = np.repeat([0, 1], [len(clean), len(other)])
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(rows, labels)
    return lambda values: torch.from_numpy(model.decision_function(values.double().nan_to_num().numpy()))


def labelled(name: str, year: int, paper: str) -> Callable[[Columns], Columns]:
    """Register columns ``(n, k)`` on which a logistic regression is trained, with labelled images of the case."""

    def register(columns: Columns) -> Columns:
        def fitted(fit: Fit) -> Score:
            of = columns(fit)
            score = logistic(of(fit.clean), of(fit.challenges))
            return lambda seen: score(of(seen))

        method(name, year, paper, Protocol.LABELLED)(fitted)
        return columns

    return register


@labelled("gradient norms, labelled", 2022, "Lee et al.: all parameters")
def gradient_columns(fit: Fit) -> Callable[[Seen], Tensor]:
    return _norms(fit)


@labelled("activations, labelled", 2022, "control: means of every stage")
def stage_columns(fit: Fit) -> Callable[[Seen], Tensor]:
    return lambda seen: torch.cat(seen.stages, 1)


@labelled("logits, labelled", 2022, "control")
def logit_columns(fit: Fit) -> Callable[[Seen], Tensor]:
    return lambda seen: seen.logits.sort(1, descending=True).values[:, :50]


@labelled("h, labelled", 2022, "control")
def h_columns(fit: Fit) -> Callable[[Seen], Tensor]:
    return lambda seen: seen.h


@labelled("LID", 2018, "Ma et al., ICLR")
def local_dimensionality(fit: Fit, neighbours: int = 20, bank: int = 100) -> Callable[[Seen], Tensor]:
    """Of every stage ``-1 / mean(log(d_i / d_k))`` over the k nearest clean images of a batch."""
    clean = [stage[:bank] for stage in fit.clean.stages]

    def of(seen: Seen) -> Tensor:
        columns = []
        for known, values in zip(clean, seen.stages, strict=True):
            distance = torch.cdist(values, known)
            # A sample is no neighbour of itself.
            distance[distance < 1e-4] = torch.inf
            nearest = distance.topk(min(neighbours, len(known) - 1), 1, largest=False).values
            columns.append(-1 / (nearest / nearest[:, -1:]).clamp_min(1e-12).log().mean(1).clamp_max(-1e-6))
        return torch.stack(columns, 1)

    return of
