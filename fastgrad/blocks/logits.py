"""The network's own answer: its logits, their energy and the margin between the two highest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.extraction import Pass
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.rows import Rows

#: Logits that the challenge classifier reads, in falling order.
_HIGHEST = 10
#: An energy below this is none: of logits that are log probabilities it is 0, and what is left of it rounding.
_NO_ENERGY = 1e-4


class Energy(Fitted):
    """Minus the log-sum-exp of the logits: ``s(z) = -log sum_j exp(z_j)``.

    Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection", 2020.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of ``logits`` ``(B, N)``."""
        energy = -torch.logsumexp(logits, -1)
        return energy.masked_fill(energy.abs() < _NO_ENERGY, 0.0)


class Margin(Fitted):
    """Minus the logarithm of the distance between the two highest logits: ``s(z) = -log(z_(1) - z_(2))``.

    Scheffer, Decomain and Wrobel, "Active hidden Markov models for information extraction", 2001, on
    probabilities; on logits it does not saturate. Few clean inputs come close to 0, in proportion to the distance. So
    the logarithm has an exponential tail, which p-values follow: DeepFool on EfficientNet-Lite0, AUROC .81 to .90.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of the two highest ``logits`` ``(B, 2)``, in falling order."""
        # Nearer than rounding no distance means anything.
        rounding = torch.finfo(torch.float32).eps * logits[:, 0].abs()
        return -torch.log((logits[:, 0] - logits[:, 1]).clamp(min=1e-30) + rounding)


class Logits(Block):
    """Logits ``(B, N)``.

    Energy is two-sided: an attack may make the network more certain than any clean input does. The margin is
    one-sided: an attack that stops at the boundary leaves a small one.
    """

    name = "logits"
    alarm = "class scores unusually weak, strong or close together"
    shapes = "(B, N)"

    def values(self, found: Pass) -> Tensor:
        return found.logits

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield "energy", Rows.fit(blocks, cls.name, standardise=False), Energy(two_sided=True)
        if blocks[cls.name].shape[1] > 1:
            yield "margin", Rows.fit(blocks, cls.name, top=2, standardise=False), Margin()

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """The highest logits in falling order: the classifier must not depend on the order of classes."""
        return cls.rows(blocks, settings, top=_HIGHEST)
