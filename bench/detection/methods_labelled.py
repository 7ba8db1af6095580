"""Detectors of the literature on attacks that are trained on the attack itself, as the papers' own tables have them."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.detection.experiment import Fit, Seen
from bench.detection.methods_ours import logistic
from bench.detection.registry import METHODS, Protocol, Score, method

#: Neighbours of the local intrinsic dimension, as its authors have it for CIFAR-10.
NEIGHBOURS = 20


@method("softmax, labelled", 2017, "Hendrycks and Gimpel, ICLR: nothing is trained", Protocol.LABELLED)
def softmax(fit: Fit) -> Score:
    return METHODS["softmax"].fit(fit)


def local_dimension(distances: Tensor) -> Tensor:
    """Return the local intrinsic dimension ``(n,)`` from the ``k`` smallest distances ``(n, k)``, in rising order.

    It is the maximum-likelihood estimate ``-1 / mean_i log(r_i / r_k)`` of Amsaleg et al. (KDD 2015). Distances of
    zero count as the smallest positive number; if all are equal, the dimension is infinite.
    """
    logs = distances.clamp_min(torch.finfo(distances.dtype).tiny).log()
    return -1 / (logs - logs[:, -1:]).mean(1)


@method(
    "LID, labelled", 2018, "Ma et al., ICLR: 20 neighbours among the clean images, every stage and the logits",
    Protocol.LABELLED,
)  # fmt: skip
def lid(fit: Fit) -> Score:
    bank = [value.double() for value in _layers(fit.clean)]

    def columns(seen: Seen) -> Tensor:
        found = []
        for value, own in zip(_layers(seen), bank, strict=True):
            distances = torch.cdist(value.double(), own)
            if seen.part == fit.clean.part:
                # The image itself, or that an attacked one is made from, is no neighbour: test images have none.
                distances[torch.arange(len(value)), seen.shown.source] = torch.inf
            nearest = distances.topk(NEIGHBOURS, largest=False).values
            found.append(local_dimension(nearest).clamp_max(1e6).log())
        return torch.stack(found, 1)

    return logistic(columns, fit.clean, fit.challenges)


def _layers(seen: Seen) -> list[Tensor]:
    return [*seen.stages, seen.logits]


def distances(values: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Return the squared Mahalanobis distance of ``others`` ``(n, D)`` to the nearest mean of a class ``(n,)``.

    Classes share the covariance of ``values`` ``(m, D)`` about their means, as in Lee et al. (2018).
    """
    classes = labels.unique()
    means = torch.stack([values[labels == k].mean(0) for k in classes])
    centred = values - means[torch.searchsorted(classes, labels)]
    inverse = torch.linalg.pinv(centred.T @ centred / len(values), hermitian=True)
    apart = others.unsqueeze(1) - means
    return torch.einsum("nkd,de,nke->nk", apart, inverse, apart).amin(1)


@method(
    "Mahalanobis, labelled", 2018, "Lee et al., NeurIPS: every stage; images are not changed before", Protocol.LABELLED
)
def mahalanobis(fit: Fit) -> Score:
    half = len(fit.labels) // 2
    known = [value[half:].double() for value in fit.clean.stages]

    def columns(seen: Seen) -> Tensor:
        pairs = zip(known, seen.stages, strict=True)
        return torch.stack([distances(own, fit.labels[half:], value.double()) for own, value in pairs], 1)

    # The regression learns from the other half, attacks being made from a part's first images.
    return logistic(columns, fit.clean, fit.challenges, before=half)
