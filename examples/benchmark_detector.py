"""Compare your own detector with fastgrad's, on clean data only and with generated challenges.

Every detector is a function that is fitted on the same clean images and returns scores, higher for less reliable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.metrics import roc_auc_score
from small_model import digits, trained
from torch import Tensor, nn

import fastgrad

Score = Callable[[Tensor], Tensor]
#: Named blocks have no cost limit, which so small a network would exceed.
BLOCKS = ["logits", "activations", "image"]


def softmax(model: nn.Module, clean: Tensor, labels: Tensor) -> Score:
    """Hendrycks and Gimpel 2017: one minus the largest probability."""
    return lambda x: 1 - model(x).softmax(1).amax(1)


def mine(model: nn.Module, clean: Tensor, labels: Tensor) -> Score:
    """Your method in place of this one: the energy of the logits (Liu et al. 2020)."""
    return lambda x: -model(x).logsumexp(1)


def ours(challenges: str | None) -> Callable[[nn.Module, Tensor, Tensor], Score]:
    """Return fastgrad's detector, with or without generated challenges."""

    def fit(model: nn.Module, clean: Tensor, labels: Tensor) -> Score:
        two_stage = fastgrad.TwoStageModel(model, blocks=BLOCKS).fit([(clean, labels)], challenges=challenges)
        return lambda x: two_stage(x).uncertainty

    return fit


def cases(clean: Tensor) -> dict[str, Tensor]:
    """Return inputs to distinguish from clean ones, of kinds that ``fit`` does not generate."""
    generator = torch.Generator().manual_seed(1)
    salt = torch.rand(clean.shape, generator=generator)
    occluded = clean.clone()
    occluded[..., 4:12, 4:12] = 0.5
    return {
        "salt": clean.where(salt > 0.05, 1.0),
        "occluded": occluded,
        "rotated": clean.rot90(1, (2, 3)),
        "uniform noise": torch.rand(clean.shape, generator=generator),
    }


def main() -> None:
    """Print the AUROC of every method on every case."""
    images, labels = digits()
    model = trained(images[:900], labels[:900])
    clean, truth, test = images[900:1500], labels[900:1500], images[1500:]
    challenging = cases(test)
    methods = {
        "softmax": softmax,
        "mine": mine,
        "fastgrad, clean only": ours(None),
        "fastgrad": ours("generate"),
    }
    print(f"{'method':24}", *(f"{name:>14}" for name in challenging))
    for name, fit in methods.items():
        with torch.no_grad():
            score = fit(model, clean, truth)
            shown = [torch.cat([score(test), score(x)]) for x in challenging.values()]
            scores = [roc_auc_score(torch.arange(len(both)) >= len(test), both) for both in shown]
        print(f"{name:24}", *(f"{value:14.3f}" for value in scores))


if __name__ == "__main__":
    main()
