"""Multi-head attention, which uses the weights of its projections itself, without calling linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad.layers.linear import bias_sqnorm, weight_sqnorm
from fastgrad.layers.reduce import leaf
from fastgrad.layers.registry import ReplayRule
from fastgrad.losses import compute_dtype

_OPTIONS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip
#: Names of the projection weights if they are not packed in one tensor.
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as a term to add to scores; boolean masks are true where attention is forbidden."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def multihead_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Rule for ``torch.nn.MultiheadAttention``.

    Attention is computed again from its projected queries, keys and values. The gradients there and at the output are
    the output gradients of four linear maps.
    """
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(_OPTIONS, args, strict=False)) | kwargs
    dtype = compute_dtype(gradients[0].dtype)
    inputs = [given[name].to(dtype) for name in ("query", "key", "value")]
    grad = gradients[0].to(dtype)
    if not module.batch_first:
        inputs, grad = [x.transpose(0, 1) for x in inputs], grad.transpose(0, 1)
    samples = inputs[0].shape[0]
    heads = module.num_heads
    packed, bias = module.in_proj_weight, module.in_proj_bias
    weights = [getattr(module, name) for name in _SEPARATE] if packed is None else packed.chunk(3)
    biases = [None] * 3 if bias is None else bias.to(dtype).chunk(3)
    with torch.enable_grad():
        leaves = [leaf(F.linear(x.detach(), w.to(dtype), b)) for x, w, b in zip(inputs, weights, biases, strict=True)]
        query, key, value = leaves
        rows = {"bias_k": module.bias_k, "bias_v": module.bias_v}
        extra = {name: leaf(row.to(dtype).expand(samples, 1, -1)) for name, row in rows.items() if row is not None}
        if extra:
            key, value = torch.cat([key, extra["bias_k"]], 1), torch.cat([value, extra["bias_v"]], 1)
        if module.add_zero_attn:
            key, value = (torch.cat([x, x.new_zeros(samples, 1, x.shape[2])], 1) for x in (key, value))
        appended = key.shape[1] - inputs[1].shape[1]
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(module.head_dim)
        padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
        if mask is not None:
            mask = mask.reshape(samples, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
            scores = scores + F.pad(_additive(mask, dtype), (0, appended))
        if padding is not None:
            scores = scores + F.pad(_additive(padding, dtype), (0, appended))[:, None, None, :]
        if len(gradients) > 1 or (mask is None and padding is None):
            attended = scores.softmax(-1)
        else:
            # In PyTorch, a query whose keys are all masked attends to none, but gets NaN if the weights are returned.
            none = scores.isneginf().all(-1, keepdim=True)
            attended = scores.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
        context = (attended @ value).transpose(1, 2).flatten(2)
        out = F.linear(context, module.out_proj.weight.to(dtype), None)
        outputs, grads = [out], [grad]
        if len(gradients) > 1:
            averaged = given.get("average_attn_weights", True)
            outputs.append(attended.mean(1) if averaged else attended)
            grads.append(gradients[1].to(dtype))
        found = torch.autograd.grad(outputs, [*leaves, *extra.values()], grads)
    per_projection = [weight_sqnorm(x, g) for x, g in zip(inputs, found[:3], strict=True)]
    # The module has either the packed weight or the three separate ones, so both forms are given.
    return {
        "out_proj.weight": weight_sqnorm(context.detach(), grad),
        "out_proj.bias": bias_sqnorm(grad),
        "in_proj_weight": torch.stack(per_projection).sum(0),
        **dict(zip(_SEPARATE, per_projection, strict=True)),
        "in_proj_bias": torch.stack([bias_sqnorm(g) for g in found[:3]]).sum(0),
        **{name: bias_sqnorm(g) for name, g in zip(extra, found[3:], strict=True)},
    }


ATTENTION = ReplayRule("multi-head attention", multihead_attention, children=("out_proj.weight", "out_proj.bias"))
