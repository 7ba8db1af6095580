"""A correction of the answers to unusual inputs that does no harm: it is kept only if it answers better.

The corrected logits are ``z + W h + b``, where z are the network's calibrated logits and h enters its last layer. An
answer is ``(1 - g) softmax(z) + g softmax(z + W h + b)``, where g is the probability that the input is a challenge.

W and b start at zero. They minimise the cross-entropy of clean inputs and of challenges, which have the labels of the
clean inputs that they were made from and the same total weight, plus ``c ||W||^2 / 2`` for standardised h. The penalty
c is chosen by cross-validation over sources, from strong to weak as long as the log loss falls. No correction is among
the candidates: it is chosen unless the gain in log loss exceeds its 95 % interval, and the accuracy on clean inputs and
on challenges is not lower by more than its own. The gains are paired, and the copies of a source count together.

This is the second stage of "Introspective Learning" (Prabhushankar and AlRegib, 2022) in another form: it starts from
the network's own answers instead of training a second network on the same inputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgrad.ops.dispatch import full_precision
from fastgrad.scores.fitted import Fitted

#: Penalties c, folds of the sources, and most steps of L-BFGS.
PENALTIES, FOLDS, STEPS = (10.0, 1.0, 0.1, 0.01), 5, 60


class Correction(Fitted):
    """What is added to the logits: a linear map of h."""

    weight: Tensor  # (D, N)
    bias: Tensor  # (N,)

    def forward(self, h: Tensor, logits: Tensor) -> Tensor:
        """Return the corrected ``logits`` ``(B, N)``, in their dtype, of inputs with h ``(B, D)``."""
        return logits + h.to(logits.dtype) @ self.weight.to(logits.dtype) + self.bias.to(logits.dtype)


@dataclass(frozen=True)
class Labelled:
    """Clean inputs and challenges with labels, n in all."""

    h: Tensor  # (n, D)
    logits: Tensor  # (n, N), calibrated
    odds: Tensor  # (n,), log odds of a challenge, from evidence of fits without the input and its source
    labels: Tensor  # (n,)
    challenging: Tensor  # (n,), bool
    sources: NDArray[np.intp]  # (n,); a challenge has that of its clean input


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: NDArray[np.float64], sources: NDArray[np.intp]) -> Interval:
        """Return those of ``values`` ``(n,)``; values of one source are not independent."""
        mean = values.mean()
        sums = np.bincount(np.unique(sources, return_inverse=True)[1], values - mean)
        return cls(float(mean), float(1.96 * np.sqrt(np.square(sums).sum()) / len(values)))


class Choice(NamedTuple):
    """The correction that was chosen, None if it is none, and what it does.

    ``log_p`` ``(n, N)`` are log probabilities of the answers, each by a fit without the input and its source.
    """

    correction: Correction | None
    log_p: Tensor
    words: str


def mixed(log_p: Tensor, corrected: Tensor, odds: Tensor) -> Tensor:
    """Return the log of ``(1 - g) p + g q``: ``log_p`` ``(B, N)``, q of the ``corrected`` logits, g by its log odds."""
    odds = odds.to(log_p.dtype).unsqueeze(-1)
    return torch.logaddexp(log_p + logsigmoid(-odds), corrected.log_softmax(-1) + logsigmoid(odds))


def choose(data: Labelled, seed: int, *, draft: bool = False) -> Choice:
    """Fit every candidate by folds, and the best once more on all inputs; warn if it is none.

    A ``draft`` is zero and has the same price.
    """
    network = data.logits.double().log_softmax(1)
    if draft:
        nothing = network.new_zeros(data.h.shape[1] + 1, network.shape[1])
        return Choice(Correction(weight=nothing[:-1], bias=nothing[-1]), network, "")
    mean, scale = data.h.mean(0), data.h.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    rows = (data.h - mean) / scale
    source = np.unique(data.sources, return_inverse=True)[1]
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(source.max() + 1)[source] % FOLDS)
    flats: list[NDArray[np.float64] | None] = [None] * FOLDS
    best: tuple[Interval, float, Tensor] | None = None
    for penalty in PENALTIES:
        log_p = network.clone()
        for number in range(FOLDS):
            other = fold == number
            flats[number] = flat = _fit(data, rows, ~other, penalty, flats[number])
            corrected = _unpack(flat, rows, data.logits)(rows[other], data.logits[other].double())
            log_p[other] = mixed(network[other], corrected, data.odds[other])
        gain = Interval.of(_balanced(data, _own(log_p, data) - _own(network, data)), source)
        if best is not None and gain.mean <= best[0].mean:
            break
        best = gain, penalty, log_p
    assert best is not None
    gain, penalty, log_p = best
    right, alone = (v.argmax(1).eq(data.labels).double().numpy() for v in (log_p, network))
    better, words = gain.mean > gain.half, []
    for name, group in (("clean inputs", ~data.challenging), ("challenges", data.challenging)):
        own = group.numpy()
        change = Interval.of((right - alone)[own], source[own])
        better &= change.mean >= -change.half
        words.append(
            f"{alone[own].mean():.1%} of {own.sum()} {name} right by the network, {right[own].mean():.1%} corrected "
            f"({100 * change.mean:+.1f} +- {100 * change.half:.1f} points)"
        )
    if not better:
        warnings.warn(
            f"correct=True: no correction certainly answers better, so the network answers alone: {'; '.join(words)}",
            stacklevel=5,  # whoever calls `TwoStageModel.fit`
        )
        return Choice(None, network, "; ".join(words))
    found = _unpack(_fit(data, rows, torch.ones_like(fold, dtype=torch.bool), penalty, None), rows, data.logits)
    weight = found.weight / scale.unsqueeze(1)
    return Choice(Correction(weight=weight, bias=found.bias - mean.double() @ weight), log_p, "; ".join(words))


def _own(log_p: Tensor, data: Labelled) -> Tensor:
    return log_p.gather(1, data.labels.unsqueeze(1)).squeeze(1)


def _balanced(data: Labelled, values: Tensor) -> NDArray[np.float64]:
    """Return ``values`` ``(n,)`` with weights of mean 1, by which clean inputs and challenges count equally."""
    return (values * len(values) * _shares(data.challenging)).numpy()


def _shares(challenging: Tensor) -> Tensor:
    count = challenging.double().sum()
    return torch.where(challenging, 0.5 / count, 0.5 / (len(challenging) - count))


def _unpack(flat: NDArray[np.float64], rows: Tensor, logits: Tensor) -> Correction:
    values = torch.from_numpy(flat).view(rows.shape[1] + 1, logits.shape[1])
    return Correction(weight=values[:-1], bias=values[-1])


def _fit(
    data: Labelled, rows: Tensor, chosen: Tensor, penalty: float, start: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Return weights and bias, flat, that minimise the objective of the ``chosen`` inputs; products are in float32."""
    x, logits, labels = rows[chosen].float(), data.logits[chosen].float(), data.labels[chosen].unsqueeze(1)
    shares = _shares(data.challenging[chosen]).float().unsqueeze(1)
    shape = (x.shape[1] + 1, logits.shape[1])

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        values = torch.from_numpy(flat).float().view(shape)
        log_p = (logits + torch.addmm(values[-1], x, values[:-1])).log_softmax(1)
        value = -(log_p.gather(1, labels) * shares).sum() + penalty / 2 * values[:-1].square().sum()
        error = log_p.exp_() * shares
        error.scatter_add_(1, labels, -shares)
        slope = torch.cat([torch.addmm(values[:-1], x.T, error, beta=penalty), error.sum(0, keepdim=True)])
        return float(value), slope.flatten().double().numpy()

    first = np.zeros(shape[0] * shape[1]) if start is None else start
    with torch.inference_mode(False), torch.no_grad(), full_precision(x.device):
        found: NDArray[np.float64] = minimize(
            objective, first, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
        ).x
    return found
