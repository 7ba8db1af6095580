"""The noise scale is what its definition says."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_arguments import refused
from torch import nn

import fastgrad


def test_the_estimates_average_to_the_definition_over_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 0, 1])
    parameters = list(model.parameters())
    noise = fastgrad.NoiseScale()
    # Pairs drawn with replacement: all of them, each as often as every other, so the mean is the expectation.
    for i in range(6):
        for j in range(6):
            pair = torch.tensor([i, j])
            with fastgrad.record(model):
                loss = F.cross_entropy(model(x[pair]), y[pair], reduction="sum")
                sqnorms = fastgrad.grad_sqnorm(loss, parameters, retain_graph=True)
                gradients = torch.autograd.grad(loss, parameters)
            noise.update(torch.stack(sqnorms).sum(0), sum(g.square().sum() for g in gradients))
    losses = (F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(6))
    rows = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses])
    mean = rows.mean(0)
    trace = (rows - mean).square().sum(1).mean()
    # Sums of a hundred terms in float64.
    assert noise.gradient_sqnorm == pytest.approx(float(mean.square().sum()), rel=1e-12)
    assert noise.trace == pytest.approx(float(trace), rel=1e-12)
    assert noise.scale == pytest.approx(float(trace / mean.square().sum()), rel=1e-12)


def test_moving_averages_forget() -> None:
    made = torch.Generator().manual_seed(0)
    noise, last = fastgrad.NoiseScale(0.9), fastgrad.NoiseScale(0.0)
    estimates = []
    for _ in range(5):
        gradients = torch.randn(4, 7, generator=made, dtype=torch.float64) + 1
        given = gradients.square().sum(1), gradients.sum(0).square().sum()
        noise.update(*given)
        last.update(*given)
        estimates.append((last.trace, last.gradient_sqnorm))
    weights = [0.9**k for k in range(4, -1, -1)]
    trace, gradient = (sum(w * e[i] for w, e in zip(weights, estimates, strict=True)) / sum(weights) for i in (0, 1))
    assert noise.trace == pytest.approx(trace, rel=1e-12)
    assert noise.gradient_sqnorm == pytest.approx(gradient, rel=1e-12)
    assert noise.scale == pytest.approx(trace / gradient, rel=1e-12)


BAD = [
    ((torch.ones(1), 1.0), ValueError, r"sqnorms must have shape \(B,\) with B at least 2; it was \(1,\)"),
    ((torch.ones(2, 2), 1.0), ValueError, "sqnorms must have shape"),
    (([1.0, 1.0], 1.0), TypeError, "sqnorms must be a torch.Tensor"),
    ((torch.tensor([1.0, -1.0]), 1.0), ValueError, "sqnorms must be finite and not negative; it held -1.0"),
    ((torch.tensor([1.0, math.nan]), 1.0), ValueError, "sqnorms must be finite"),
    ((torch.tensor([1.0, math.inf]), 1.0), ValueError, "sqnorms must be finite and not negative; it held inf"),
    ((torch.ones(2), torch.ones(2)), ValueError, "batch_sqnorm must be one number"),
    ((torch.ones(2), "much"), ValueError, "batch_sqnorm must be numeric"),
    ((torch.ones(2), torch.tensor(1j)), ValueError, "batch_sqnorm must be numeric"),
    ((torch.ones(2), math.inf), ValueError, "batch_sqnorm must be finite"),
    ((torch.ones(2), 4.1), ValueError, "batch_sqnorm must be that of the sum .* at most 4 .*it was 4.1"),
]
test_bad_arguments = refused(
    [(partial(lambda given: fastgrad.NoiseScale().update(*given), given), *said) for given, *said in BAD]
    + [
        (lambda: fastgrad.NoiseScale(1), ValueError, r"decay must lie in \[0, 1\); it was 1"),
        (lambda: fastgrad.NoiseScale("all"), TypeError, "decay must be a number; it was 'all'"),
    ]
)


def test_limits() -> None:
    fastgrad.NoiseScale(np.float32(0.5))
    noise, same = fastgrad.NoiseScale(), fastgrad.NoiseScale()
    assert math.isnan(noise.scale)
    noise.update(torch.ones(2), 0.0)
    assert noise.scale == math.inf
    same.update(torch.ones(4), 16 * (1 + 1e-6))  # samples that are alike
    assert (same.trace, same.scale) == (0, 0)
    assert same.gradient_sqnorm == pytest.approx(1)
