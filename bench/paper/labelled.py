"""Published detectors that are trained on labelled attacks; higher is less reliable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.paper.published import Scores
from bench.paper.subject import Subject


class MahalanobisLayers:
    """Mahalanobis distances after every stage (Lee et al. 2018), with or without input pre-processing.

    Vanilla (V) reads the penultimate features, P moves the input towards the nearest class first, FE joins
    the stages by logistic regression on labelled clean and attacked samples, P+FE does both.
    """

    def __init__(self, subject: Subject) -> None:
        from pytorch_ood.detector import Mahalanobis

        self.model = subject.model
        features, labels = subject.seen
        self.stages = []
        for values in features:
            stage = Mahalanobis(None)
            stage.fit_features(values, labels)
            self.stages.append((stage.mu.detach(), stage.precision.detach()))

    def _distance(self, values: Tensor, index: int) -> Tensor:
        mean, precision = self.stages[index]
        centred = values[:, None] - mean[None]
        return torch.einsum("bkd,de,bke->bk", centred, precision, centred).amin(1)

    def distances(self, images: Tensor, magnitude: float) -> Scores:
        """``(B, stages)``; each stage has its own pre-processing of size ``magnitude``."""
        found = []
        for part in torch.split(images, 128):
            columns = []
            for index in range(len(self.stages)):
                x = part.clone().requires_grad_(magnitude > 0)
                distance = self._distance(self.model.stage_features(x)[index], index)
                if magnitude > 0:
                    (slope,) = torch.autograd.grad(distance.sum(), x)
                    with torch.no_grad():
                        moved = self.model.stage_features(part - magnitude * slope.sign())[index]
                        distance = self._distance(moved, index)
                columns.append(distance.detach())
            found.append(torch.stack(columns, 1))
        return torch.cat(found).double().numpy()


def logistic(clean: Scores, attacked: Scores) -> Callable[[Scores], Scores]:
    """Logistic regression on standardised columns: how the published feature ensembles are joined."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([clean, attacked])
    labels = np.repeat([0, 1], [len(clean), len(attacked)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    model.fit(rows, labels)
    return lambda values: model.decision_function(values).astype(np.float64)


def local_dimensionality(
    reference: Sequence[Scores], values: Sequence[Scores], neighbours: int = 20, batch: int = 100
) -> Scores:
    """LID after every stage ``(B, stages)`` (Ma et al. 2018), against mini-batches of clean ``reference``.

    The maximum-likelihood estimate ``-1 / mean(log(d_i / d_k))`` over the k nearest clean samples of a batch.
    """
    columns = []
    for clean, rows in zip(reference, values, strict=True):
        parts = []
        for start in range(0, len(rows), batch):
            offset = start % max(1, len(clean) - batch)
            bank = clean[offset : offset + batch]
            square = ((rows[start : start + batch, None] - bank[None]) ** 2).sum(-1)
            distance = np.sqrt(square)
            # A sample is no neighbour of itself.
            distance[distance < 1e-6] = np.inf
            nearest = np.sort(distance, 1)[:, :neighbours]
            ratios = np.log(np.maximum(nearest / nearest[:, -1:], 1e-12))
            parts.append(-1 / np.minimum(ratios.mean(1), -1e-6))
        columns.append(np.concatenate(parts))
    return np.stack(columns, 1)
