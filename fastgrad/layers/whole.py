"""Functions without parameters that run on the whole batch, because vmap would be slower or wrong."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.layers.call import Call
from fastgrad.layers.recurrent import CELLS


def on_images(function: Callable[..., Any], call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Rule for a function of images ``(B, C, *L)`` that treats each by itself."""
    others = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    if not call.is_batched(input) or input.dim() < 3 or any(others):
        return NotImplemented

    def on_batch() -> Any:
        x = call.physical(input)
        out = function(x.flatten(0, 1), *args, **kwargs)
        return pytree.tree_map(lambda t: t.unflatten(0, x.shape[:2]), out)

    return call.on_batch(on_batch)


def dropout(call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Rule for ``torch.nn.functional.dropout``, which draws the numbers of an ordinary call of the whole batch."""
    if not call.is_batched(input) or not training:
        return NotImplemented
    return call.on_batch(lambda: F.dropout(call.physical(input), p, training, inplace))


def attention(
    call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.scaled_dot_product_attention``.

    Under vmap it would pick a fused kernel without a derivative for its mask, not seeing that the mask needs one.
    """
    if not all(call.is_batched(t) and t.dim() == 4 and t.shape[0] == 1 for t in (query, key, value)):
        return NotImplemented
    if call.owns(attn_mask):
        attn_mask = call.copy_of(attn_mask)  # type: ignore[arg-type]
    if attn_mask is not None and call.is_batched(attn_mask):
        # Also one that was computed from parameters, and so is a copy per sample, (heads, T, T).
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]

    def on_batch() -> Any:
        q, k, v = (call.physical(t).flatten(0, 1) for t in (query, key, value))
        mask = attn_mask
        if attn_mask is not None and call.is_batched(attn_mask):
            mask = call.physical(attn_mask).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)
        return out.unflatten(0, (call.samples, 1))

    return call.on_batch(on_batch)


def _entered(function: Any) -> Callable[..., Any]:
    """Return a function of ``torch.nn.functional`` that skips modes itself, so that they see the functions inside."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    inner = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


IMAGES = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate,
)  # fmt: skip
#: By the function, its rule.
WHOLE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.dropout: dropout,
    **{function: functools.partial(on_images, function) for function in IMAGES},
}


def contains(self: Tensor, element: Any) -> bool:
    """Compute ``Tensor.__contains__``."""
    return bool((self == element).any())


def equal(input: Tensor, other: Tensor) -> bool:
    """Compute ``torch.equal``."""
    return input.shape == other.shape and bool((input == other).all())


#: Functions that use parameters or read values inside, and what runs in their place so that the mode sees this.
ENTERED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _entered(F.multi_head_attention_forward),
    **CELLS,
    Tensor.__contains__: contains,
    torch.equal: equal,
    Tensor.equal: equal,
}
