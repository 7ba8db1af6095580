"""Linear layers with any number of positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrad.layers.reduce import positions_first, sqnorm, upcast
from fastgrad.layers.registry import register_rule

#: Bytes of per-sample weight gradients held at once on the direct route: a chunk that stays in cache.
_CHUNK_BYTES = 16 * 2**20


def weight_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """Squared norm of the weight gradient ``sum_t g_t a_t^T`` of each sample.

    One position needs only ``||a||^2 ||g||^2``. With more, the direct route forms ``g^T a`` (cost ``2 T C O``)
    a few samples at a time, the Gram route ``sum((a a^T) * (g g^T))`` (cost ``T^2 (C + O)``), whose last
    reduction runs in float64 because its terms have both signs.

    Args:
        a: Inputs ``(B, T, C)``.
        g: Output gradients ``(B, T, O)``.

    Returns:
        ``(B,)``, float32 (float64 for float64 tensors).
    """
    a, g = upcast(a, g)
    samples, t, c = a.shape
    o = g.shape[2]
    if t == 1:
        return sqnorm(a) * sqnorm(g)
    if t * (c + o) < c * o:
        gram = torch.bmm(a, a.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))
        return gram.sum((1, 2), dtype=torch.float64).to(a.dtype)
    if isinstance(samples, torch.SymInt):  # being traced with a dynamic batch: no chunks
        return sqnorm(torch.bmm(g.transpose(1, 2), a))
    step = max(1, _CHUNK_BYTES // (c * o * a.element_size()))
    parts = [
        sqnorm(torch.bmm(g[i : i + step].transpose(1, 2), a[i : i + step])) for i in range(0, samples, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def bias_sqnorm(g: Tensor) -> Tensor:
    """Squared norm of a bias gradient, the sum of ``g`` over positions: ``(B, T, O) -> (B,)``."""
    (g,) = upcast(g)
    return sqnorm(g[:, 0] if g.shape[1] == 1 else g.sum(1))


@register_rule(nn.Linear, name="linear", positions=True, in_place=True)
def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for ``torch.nn.Linear``."""
    a, g = positions_first(a, 1), positions_first(g, 1)
    return {"weight": weight_sqnorm(a, g), "bias": bias_sqnorm(g)}
