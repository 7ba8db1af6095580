"""Turn a block into rows for a score: order by logit rank, logarithm, standardisation, projection."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastgrad.checks import Array
from fastgrad.ops.dispatch import full_precision
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.mahalanobis import principal

#: Squared norms that underflowed to zero get the logarithm of this value: it is extreme, but finite.
SMALLEST = float(np.finfo(np.float32).tiny)
_EPS = float(np.finfo(np.float32).eps)
# Relative rounding error of what a float32 network computes: some units in the last place.
_ROUNDING = 8 * _EPS
#: Projections of blocks with more columns than this are stored and multiplied in float32: nothing cancels in them.
WIDE = 1024
# Clean data that vary by less than so many times their rounding, 1 % of the values, are not scaled up to variance 1.
_LEAST = 1e4


class ScoreRows(Fitted):
    """Rows ``(B, d)`` for a score, from the named blocks.

    Options: ``block``, the block's name; ``rank``, whether to order its class axis by logit rank, and ``by_logits``,
    whether by the block of logits instead of the norms of the last parameter; ``log``, whether to take logarithms;
    ``top``, how many of the largest entries to keep, in descending order (0: all, in their own order); ``clip``, the
    limit of standardised values, or None; ``extra_columns``, the largest number of columns, evenly spaced, to append
    to the projection, weighted so that together they have its variance.
    """

    mean: Tensor  # (d,), of the clean rows after the logarithm
    scale: Tensor  # (d,)
    projection: Tensor  # (d, e)
    shift: Tensor  # (e,), the mean projection of the clean rows

    @classmethod
    def fit(
        cls,
        blocks: Mapping[str, Tensor],
        block: str,
        *,
        norms: bool = False,
        rank: bool = False,
        log: bool = False,
        top: int = 0,
        standardise: bool = True,
        clip: float | None = None,
        dimensions: int | None = None,
        extra_columns: int = 0,
    ) -> ScoreRows:
        """Fit on clean ``blocks``, squared norms if ``norms``; ``dimensions``: at most so many whitened components."""
        rows = cls(
            block=block,
            rank=rank,
            log=log,
            top=top,
            by_logits="logits" in blocks,
            clip=clip,
            extra_columns=extra_columns,
        )
        flat = rows.flat(blocks)
        mean, scale = torch.zeros_like(flat[0]), torch.ones_like(flat[0])
        # Of squared norms, the logarithm turns the relative error into an absolute one; storing it rounds once more.
        size = flat.abs().mean(0)
        rounding = _ROUNDING + _EPS * size if norms else _ROUNDING * size
        if standardise:
            mean, spread = flat.mean(0), flat.std(0, correction=0)
            # A constant column carries no information until it changes; such a change counts in the column's own unit.
            scale = torch.where(
                spread > 1e-12 * (1 + mean.abs()), spread.maximum(_LEAST * rounding), torch.ones_like(spread)
            )
        rows.register_buffer("mean", mean)
        rows.register_buffer("scale", scale)
        if dimensions is not None and dimensions < flat.shape[1]:
            values = rows.standardised(flat)
            projection = whitening(values, dimensions, rounding / scale)
            rows.register_buffer("shift", values.mean(0) @ projection)
            projection = projection.float() if len(projection) > WIDE else projection
            rows.register_buffer("projection", projection.contiguous())
        return rows

    def flat(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return the block before standardisation, ``(B, d)``."""
        values = blocks[self.options["block"]].double()
        if self.options["rank"]:
            # (B, signals, classes, parameters), with classes by descending logit, so that no column is one class.
            values = values if values.dim() == 4 else values.unsqueeze(1)
            values = values if values.dim() == 4 else values.unsqueeze(-1)
            # The last parameter is usually the last layer's bias, whose norm falls as the contrast's logit rises.
            logits = blocks["logits"].double() if self.options["by_logits"] else -values[:, -1, :, -1]
            order = torch.argsort(logits, dim=-1, descending=True, stable=True)
            values = torch.gather(values, 2, order[:, None, :, None].expand_as(values))
        values = values.flatten(1)
        if self.options["log"]:
            values = values.clamp(min=SMALLEST).log()
        if self.options["top"]:
            values = torch.topk(values, min(self.options["top"], values.shape[-1]), dim=-1).values
        return values

    def standardised(self, flat: Tensor) -> Tensor:
        """Standardise the rows ``(B, d)`` of `flat` by the mean and scale of the clean ones."""
        if flat.shape[1:] != self.mean.shape:
            raise ValueError(
                f"the block {self.options['block']!r} must have as many entries a sample as in the detector's fit, "
                f"{len(self.mean)}; it had {flat.shape[1]}"
            )
        rows = (flat - self.mean) / self.scale
        clip = self.options["clip"]
        return rows if clip is None else clipped(rows, clip)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return rows ``(B, d)``, ``(B, e)``, or ``(B, e + c)`` with c columns beside the projection, float64."""
        rows = self.standardised(self.flat(blocks))
        if "projection" not in self._buffers:
            return rows
        with full_precision(rows.device):
            components = (rows.to(self.projection.dtype) @ self.projection).double() - self.shift
        if not self.options["extra_columns"]:
            return components
        columns = rows[:, :: -(-len(self.mean) // self.options["extra_columns"])]
        return torch.cat([components, columns * math.sqrt(components.shape[1] / columns.shape[1])], 1)


def as_tensor(array: Array) -> Tensor:
    """Return ``array`` as a tensor, copied only if it is read-only or has negative strides."""
    return torch.from_numpy(array if array.flags.writeable and min(array.strides) >= 0 else array.copy())


def clipped(rows: Tensor, limit: float) -> Tensor:
    """Clip ``rows`` to within ``limit`` of 0; infinity, a failure and not a large value, becomes NaN instead."""
    return rows.nan_to_num(torch.nan, torch.nan, torch.nan).clamp(-limit, limit)


def whitening(rows: Tensor, dimensions: int, rounding: Tensor) -> Tensor:
    """Return the projection ``(d, e)`` of standardised ``rows`` on principal components, each of unit variance.

    Components in which the rows vary by little more than their ``rounding`` ``(d,)`` are left out.
    """
    values, directions = principal(rows - rows.mean(0), dimensions)
    # Unbiased variances, with n - 1 degrees of freedom.
    spread = (values[: directions.shape[1]] * len(rows) / max(1, len(rows) - 1)).sqrt()
    noise = (directions.square().T @ rounding.square()).sqrt()
    keep = spread > (_LEAST * noise).clamp(min=1e-6 * max(float(spread[0]), 1e-300))
    if not keep.any():
        return torch.zeros(rows.shape[1], 1, dtype=torch.float64, device="cpu")
    return directions[:, keep] / spread[keep]
