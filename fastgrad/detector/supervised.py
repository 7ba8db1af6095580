"""H, the detector trained on labels: fitted by scikit-learn, scored in torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastgrad.scores import fitted
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.rows import clipped

Array = NDArray[np.float64]

#: H among the evidence.
NAME = "challenges"

# Standardised rows are cut here, so that no single feature, however far out, decides alone.
_LIMIT = 50.0
# Training of H: samples a step (half of them clean), passes over the data and their bounds in steps, AdamW's two.
_BATCH, _EPOCHS, _FEWEST_STEPS, _MOST_STEPS, _RATE, _DECAY = 256, 40, 100, 1500, 4e-3, 1e-2


def alarm(blocks: Sequence[str]) -> str:
    """What an alarm of H means that reads these ``blocks``, as `fastgrad.blocks.Block.alarm` says it of a block."""
    seen = ", ".join(name.replace("_", " ") for name in blocks)
    return f"resemblance to altered or foreign inputs that the detector was trained on (seen in {seen})"


class Joint(Fitted):
    """Rows of several blocks side by side, ``(B, d)``."""

    parts: fitted.Sequence

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Standardised rows, cut at 50 standard deviations."""
        return clipped(torch.cat([rows(blocks) for rows in self.parts], -1), _LIMIT)

    @property
    def widths(self) -> list[int]:
        """How many columns are whose."""
        return [rows.width for rows in self.parts]


def views(widths: Sequence[int], members: int) -> Tensor:
    """Which columns each network of H sees, ``(M, d)`` of 0 and 1, where blocks have ``widths`` columns.

    So many ``members`` see all, and one more for each block sees that alone (as in random subspaces, Ho, 1998, but for
    chance): where all together learn the kinds of challenge by heart, what one block says still holds for others.
    """
    alone = torch.eye(len(widths)).repeat_interleave(torch.tensor(widths), 1)
    return torch.cat([torch.ones(members, sum(widths)), *([alone] if len(widths) > 1 else [])])


class Perceptrons(Fitted):
    """Mean over M networks of -log P(clean): a two-layer network with ReLU each, or one linear map.

    Buffers: ``weight`` ``(M, h, C)``, ``bias`` ``(M, 1, C)`` and, with a hidden layer, ``hidden_weight``
    ``(M, d, h)``, ``hidden_bias`` ``(M, 1, h)``. Class 0 of C is "clean", the others are kinds of challenge.
    """

    weight: Tensor
    bias: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``rows`` ``(B, d)``; higher is less like clean data."""
        hidden = rows.unsqueeze(0)
        if "hidden_weight" in self._buffers:
            hidden = torch.relu(
                torch.matmul(hidden, self.get_buffer("hidden_weight")) + self.get_buffer("hidden_bias")
            )
        logits = torch.matmul(hidden, self.weight) + self.bias
        return -torch.log_softmax(logits, -1)[..., 0].mean(0)


def fit_perceptrons(
    rows: Array,
    kinds: NDArray[np.intp],
    *,
    hidden: int | None,
    sees: Tensor,
    seed: int,
    dropout: float = 0.0,
) -> Perceptrons:
    """H from ``rows`` ``(n, d)`` and ``kinds`` ``(n,)``: 0 for clean, others for kinds of challenge.

    Telling the kinds apart makes a better "clean or not" than that question alone. Clean and challenging
    samples count alike in all, however many there are. ``hidden=None`` is logistic regression on all columns, which
    has a fixed penalty of its own; the other arguments are those of `train_networks`.
    """
    if hidden is None:
        return _logistic(rows, np.unique(kinds, return_inverse=True)[1])
    return train_networks(
        rows,
        [(np.arange(len(rows)), kinds)],
        hidden=hidden,
        sees=sees,
        seed=seed,
        dropout=dropout,
    )[0]


def _logistic(rows: Array, codes: NDArray[np.intp]) -> Perceptrons:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weights = np.where(codes == 0, 0.5 / max(1, (codes == 0).sum()), 0.5 / max(1, (codes > 0).sum()))
    linear = LogisticRegression(C=0.1, max_iter=500)
    with warnings.catch_warnings():
        # The iteration limit is a choice, not a failure to report.
        warnings.simplefilter("ignore", ConvergenceWarning)
        linear.fit(rows.astype(np.float32), codes, sample_weight=weights * len(rows))
    weight, bias = linear.coef_.T, linear.intercept_
    if weight.shape[1] == 1:
        # Scikit-learn's single log odds of two classes as two logits, the first of them zero.
        weight, bias = np.concatenate([np.zeros_like(weight), weight], 1), np.concatenate([[0.0], bias])
    return Perceptrons(
        weight=torch.as_tensor(weight, dtype=torch.float64).unsqueeze(0),
        bias=torch.as_tensor(bias, dtype=torch.float64).view(1, 1, -1),
    )


def train_networks(
    rows: Array,
    tasks: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]],
    *,
    hidden: int,
    sees: Tensor,
    seed: int,
    dropout: float = 0.0,
    epochs: int = _EPOCHS,
) -> list[Perceptrons]:
    """Two-layer networks for several tasks on the same rows, all trained at once as one batch of products.

    Trials with kinds left out differ only in the samples they learn from; in one batch they cost little more than
    one. AdamW (Loshchilov and Hutter, 2019) with one cycle of the learning rate (Smith and Topin, 2019).

    Args:
        rows: ``(n, d)``.
        tasks: For each, the rows it learns from and their kinds, 0 for clean.
        hidden: Width of the hidden layer.
        sees: ``(M, d)`` of 0 and 1, the columns that each of M networks a task sees. They differ in their start and
            in the order of samples, too.
        seed: Of both, and of what is dropped.
        dropout: Chance that a network does not see an input of a sample in a step (Srivastava et al., 2014).
        epochs: Passes over the data.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.as_tensor(rows.astype(np.float32))
    sides = []
    for picked, kinds in tasks:
        codes = torch.as_tensor(np.unique(kinds, return_inverse=True)[1])
        places = torch.as_tensor(picked)
        sides.append(((places[codes == 0], codes[codes == 0]), (places[codes > 0], codes[codes > 0])))
    classes = [1 + max((int(codes.max()) for _, codes in pair if len(codes)), default=0) for pair in sides]
    members, width = len(sees), max(classes)
    networks = len(tasks) * members
    seen = sees.repeat(len(tasks), 1).unsqueeze(2)
    parameters = [
        torch.randn(networks, x.shape[1], hidden, generator=generator)
        * seen
        * (2 / seen.sum(1, True)).sqrt(),
        torch.zeros(networks, 1, hidden),
        torch.randn(networks, hidden, width, generator=generator) * math.sqrt(1 / hidden),
        torch.zeros(networks, 1, width),
    ]
    for value in parameters:
        value.requires_grad_()
    most = max(len(picked) for picked, _ in tasks)
    half = min(_BATCH, most) // 2 or 1
    fewest = _FEWEST_STEPS * epochs / _EPOCHS
    steps = int(min(_MOST_STEPS, max(fewest, epochs * most / (2 * half))))
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    with torch.enable_grad():
        for _ in range(steps):
            drawn: list[Tensor] = []
            targets: list[Tensor] = []
            for pair in sides:
                for _ in range(members):
                    chosen = [torch.randint(len(p), (half,), generator=generator) for p, _ in pair if len(p)]
                    held = [side for side in pair if len(side[0])]
                    drawn.append(torch.cat([p[i] for (p, _), i in zip(held, chosen, strict=True)]))
                    targets.append(torch.cat([c[i] for (_, c), i in zip(held, chosen, strict=True)]))
            first, first_bias, second, second_bias = parameters
            inputs = x[torch.stack(drawn)]
            if dropout > 0:
                inputs = inputs * (torch.rand(inputs.shape, generator=generator) >= dropout) / (1 - dropout)
            activations = torch.relu(torch.baddbmm(first_bias, inputs, first * seen))
            logits = torch.baddbmm(second_bias, activations, second)
            loss = cross_entropy(logits.flatten(0, 1), torch.stack(targets).flatten()) * networks
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    found = []
    for index, count in enumerate(classes):
        own = slice(index * members, (index + 1) * members)
        values = [value.detach()[own].double() for value in parameters]
        found.append(
            Perceptrons(
                hidden_weight=values[0],
                hidden_bias=values[1],
                weight=values[2][..., :count].contiguous(),
                bias=values[3][..., :count].contiguous(),
            )
        )
    return found
