"""A correction of the answers to unusual inputs; unless it is asked for, it must do better in cross-validation.

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

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgrad.blocks.features import Features
from fastgrad.blocks.last_layer import Penultimate
from fastgrad.metrics.interval import Interval
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.softmax_regression import equal_shares, fit_softmax

#: Penalties c, folds of the sources, and most steps of L-BFGS.
PENALTIES, FOLDS, STEPS = (10.0, 1.0, 0.1, 0.01), 5, 60


class Correction(Fitted):
    """What is added to the logits: a linear map of h."""

    weight: Tensor  # (D, N)
    bias: Tensor  # (N,)

    def forward(self, h: Tensor, logits: Tensor) -> Tensor:
        """Return the corrected ``logits`` ``(B, N)``, in their dtype, of inputs with h ``(B, D)``."""
        return logits + h.to(logits.dtype) @ self.weight.to(logits.dtype) + self.bias.to(logits.dtype)


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


def choose(features: Features, logits: Tensor, odds: Tensor, seed: int, *, always: bool = False) -> Choice:
    """Fit every candidate by folds, and the best once more on all inputs.

    ``features`` hold h and labels of n clean inputs and challenges, ``logits`` ``(n, N)`` are calibrated, ``odds``
    ``(n,)`` the log odds of a challenge, from evidence of fits without the input and its source. ``always`` keeps the
    best correction even if no correction is better.
    """
    network, labels, challenging = logits.double().log_softmax(1), features.labels, features.challenging
    h = features.blocks[Penultimate.name]
    mean, scale = h.mean(0), h.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    rows, source = (h - mean) / scale, features.source_numbers.numpy()
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(source.max() + 1)[source] % FOLDS)

    def fit(chosen: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
        given = rows[chosen], labels[chosen], equal_shares(challenging[chosen]), logits[chosen]
        return fit_softmax(*given, penalty, steps=STEPS, start=start)

    fitted: list[Tensor | None] = [None] * FOLDS
    shares = equal_shares(challenging)
    best: tuple[Interval, float, Tensor] | None = None
    for penalty in PENALTIES:
        log_p = network.clone()
        for number in range(FOLDS):
            other = fold == number
            fitted[number] = values = fit(~other, penalty, fitted[number])
            correction = Correction(weight=values[:-1], bias=values[-1])
            log_p[other] = mixed(network[other], correction(rows[other], logits[other].double()), odds[other])
        gains = (log_p - network).gather(1, labels.unsqueeze(1)).squeeze(1)
        gain = Interval.of((gains * len(gains) * shares).numpy(), source)
        if best is not None and gain.mean <= best[0].mean:
            break
        best = gain, penalty, log_p
    assert best is not None
    gain, penalty, log_p = best
    right, alone = (v.argmax(1).eq(labels).double().numpy() for v in (log_p, network))
    better, words = gain.mean > gain.half, []
    for name, own in (("clean inputs", ~challenging.numpy()), ("challenges", challenging.numpy())):
        change = Interval.of((right - alone)[own], source[own])
        better &= change.mean >= -change.half
        words.append(
            f"{alone[own].mean():.1%} of {own.sum()} {name} right by the network, {right[own].mean():.1%} corrected "
            f"({100 * change.mean:+.1f} +- {100 * change.half:.1f} points)"
        )
    accuracy = "; ".join(words)
    if not better and not always:
        return Choice(None, network, f"not kept: {accuracy}")
    said = "kept" if better else "kept as asked, but not certainly better"
    values = fit(fold >= 0, penalty)
    weight = values[:-1] / scale.unsqueeze(1)
    return Choice(Correction(weight=weight, bias=values[-1] - mean.double() @ weight), log_p, f"{said}: {accuracy}")
