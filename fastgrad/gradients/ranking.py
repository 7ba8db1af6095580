"""``rank_samples``: GraNd and EL2N of every sample (Paul et al., 2021, arXiv:2107.07075).

A sample whose gradient is still large late in training is rare, hard, or labelled wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from fastgrad import checks, losses
from fastgrad.batches import as_call, bar, batch_size, refuse_probabilities, split_batch, to_device
from fastgrad.gradients.contrasts import NoClassError
from fastgrad.gradients.features import GradientFeatures

#: Columns to rank by, and whether the largest value comes first.
_KEYS = {"grand": True, "el2n": True, "loss": True, "confidence": False}


@dataclass(frozen=True)
class SampleTable:
    """Losses and norms of each sample of a data set; arrays ``(n,)``, one row per sample.

    Attributes:
        index: The sample's position in the data set, int64.
        label: Its label, int64.
        predicted: The most probable class, int64.
        loss: Cross-entropy, in nats, float64.
        confidence: The probability of the label, float64.
        el2n: L2 norm of the probabilities less the one-hot label, float64.
        grand: L2 norm of the gradient of the loss, float64.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    loss: NDArray[np.float64]
    confidence: NDArray[np.float64]
    el2n: NDArray[np.float64]
    grand: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    def sort(self, by: str = "grand", count: int | None = None) -> SampleTable:
        """Return the rows sorted, the most suspicious first; rows with NaN come before all others.

        Args:
            by: ``"grand"``, ``"el2n"`` or ``"loss"``, largest first; or ``"confidence"``, smallest first.
            count: How many rows to keep; None for all.

        Raises:
            ValueError: For any other ``by``, or a negative ``count``.
        """
        checks.one_of("by", by, _KEYS)
        if count is not None:
            checks.at_least(0, count=count)
        values = -getattr(self, by) if _KEYS[by] else getattr(self, by)
        order = np.lexsort((values, ~np.isnan(values)))[:count]
        return SampleTable(*(getattr(self, field.name)[order] for field in fields(self)))


def rank_samples(
    model: nn.Module, loader: Iterable[Any], *, layers: str | Iterable[str] | None = None, verbose: bool = False
) -> SampleTable:
    """Compute loss, confidence, EL2N and gradient norm (GraNd) of every sample (Paul et al., 2021).

    The loss is the cross-entropy. The model runs as a private copy in evaluation mode on its own device. A mean over
    several trainings, or several epochs of one, is more reliable than one table.

    Args:
        model: Maps a batch to logits ``(B, N)``.
        loader: Batches ``(x, labels)``, or mappings with the key ``"labels"``; integer labels ``(B,)``. In the order
            of the data set: a shuffling loader would make ``index`` meaningless.
        layers: Only gradients of these parameters: names or shell patterns of parameters, or names of modules; None
            for all, frozen ones included. The last layer alone costs little more than a forward pass.
        verbose: Whether to show a progress bar.

    Returns:
        One row per sample, in the loader's order.

    Raises:
        TypeError: If the loader gives something else.
        ValueError: If its sampler may give another order, it gives no labels or no samples, or a label is no class of
            the model. Also for unknown ``layers``, or a model that mixes samples or returns probabilities.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        batches = loader.batch_sampler
        sampler = loader.sampler if batches is None else getattr(batches, "sampler", batches)
        if not isinstance(sampler, SequentialSampler):
            raise ValueError(
                "loader must give samples in the order of the data set (shuffle=False); its sampler was a "
                f"{type(sampler).__name__}"
            )
    checks.is_loader("loader", loader)
    checks.is_bool(verbose=verbose)
    extractor = GradientFeatures(model, loss="cross_entropy", layers=layers, log=True)
    device = next(model.parameters()).device
    parts: list[dict[str, Tensor]] = []
    for batch in bar(loader, "samples", verbose):
        x, labels = _labelled(batch)
        labels = labels.to(device)
        args, kwargs = as_call(to_device(x, device))
        try:
            logits, logs = extractor(*args, target=labels, **kwargs)
        except NoClassError as error:
            raise ValueError(f"loader must give labels that are classes of the model: {error}") from error
        refuse_probabilities(logits)
        z = logits.double()
        # Computed from the other classes' logits, because 1 - p has no digits left where p is nearly 1.
        others = z.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1)
        log_p = F.logsigmoid(z.gather(1, labels.unsqueeze(1)).squeeze(1) - others)
        batch_columns = {
            "label": labels,
            "predicted": logits.argmax(1),
            "loss": -log_p,
            "confidence": log_p.exp(),
            "el2n": losses.target_norms(z, labels, loss="cross_entropy").sqrt(),
            "grand": (logs.double().logsumexp(1) / 2).exp(),
        }
        parts.append({name: value.detach().cpu() for name, value in batch_columns.items()})
    if not any(len(part["label"]) for part in parts):
        raise ValueError("loader must hold at least one sample; it was empty")
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return SampleTable(index=np.arange(len(columns["label"]), dtype=np.int64), **columns)


def _labelled(batch: Any) -> tuple[Tensor | dict[str, Any], Tensor]:
    """Return the inputs of a batch without its labels, and the labels."""
    x, labels = split_batch("loader", batch)
    if labels is None:
        raise ValueError("loader must give labels beside the inputs: (x, labels) or a mapping with 'labels'")
    wanted = f"loader must give integer labels of shape ({batch_size(x)},)"
    try:
        labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    # Raised for words, None and ragged lists.
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}: {error}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (batch_size(x),):
        raise ValueError(f"{wanted}; they were {labels.dtype}, {tuple(labels.shape)}")
    return x, labels.long()
