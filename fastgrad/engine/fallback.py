"""The exact general fallback: per-sample gradients of one module alone, a few samples at a time.

It serves parameters which a module holds directly (class tokens, position embeddings, layer scale, relative
position tables), layers without a rule, and parameters used more than once: all uses lie within the module
that is computed again, so their gradients add up before the norm is taken.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import is_readable, pytree
from fastgrad.engine.shadow import Settings, Shadow, ordinary
from fastgrad.engine.steps import Steps
from fastgrad.engine.tracing import is_symbolic
from fastgrad.layers.reduce import leaf, sqnorm, upcast

_ALONE = (
    "model must treat the samples of a batch independently and alike each time; its module {!r} {} for a sample alone "
    "than for the batch"
)
#: Bytes of per-sample gradients held at once.
CHUNK_BYTES = 64 * 2**20


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a module's outputs, in order."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def replay_sqnorms(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batched: Sequence[bool],
    gradients: Sequence[Tensor],
    samples: int,
    outputs: Sequence[Tensor],
    *,
    settings: Settings,
    uses: Sequence[int] | None = None,
    name: str = "",
    vectorize: bool = True,
    training: bool = False,
) -> Tensor:
    """Squared norms of each sample's gradient of ``parameters``, with all their uses inside ``module``.

    Args:
        module: The user's module; only read.
        parameters: Parameters of ``module`` or its descendants.
        args: The inputs of its one call, positional.
        kwargs: The inputs by keyword.
        batched: For each leaf of ``(args, kwargs)``, whether its dimension 0 is the batch (or a multiple of it,
            sample by sample).
        gradients: Gradients of the floating-point outputs, batch in dimension 0 likewise.
        samples: B.
        outputs: The outputs of the call, of which the replay must give every row again.
        settings: Of the module and its descendants when the call began.
        uses: For each parameter, in how many functions the call used it, of which one that it used several times must
            be used as often by every sample.
        name: The module's name in messages.
        vectorize: Whether samples of a chunk run together under ``vmap``; else one after the other, for modules
            which ``vmap`` cannot take.
        training: Whether modules keep their own mode instead of evaluation mode.

    Returns:
        ``(B, len(parameters))``.

    Raises:
        ValueError: If a sample alone gives other outputs than in its batch.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    split = [
        value.reshape(samples, -1, *value.shape[1:]) if is_batched else value
        for value, is_batched in zip(leaves, batched, strict=True)
    ]
    split_gradients = [g.reshape(samples, -1, *g.shape[1:]) for g in gradients]
    split_outputs = [out.reshape(samples, -1, *out.shape[1:]) for out in outputs]
    size = sum(p.numel() * p.element_size() for p in parameters)
    chunk = max(1, CHUNK_BYTES // max(1, size)) if vectorize else 1
    rows = []
    # A symbolic batch, in a graph being traced, stays in one piece.
    for part in (
        [slice(None)] if is_symbolic(samples) else [slice(i, i + chunk) for i in range(0, samples, chunk)]
    ):
        local = [
            value[part] if is_batched else value for value, is_batched in zip(split, batched, strict=True)
        ]
        grads = [g[part] for g in split_gradients]
        with torch.enable_grad():
            again, found = _gradients(
                module, parameters, local, spec, batched, grads, uses,
                settings=settings, name=name, vectorize=vectorize, training=training,
            )  # fmt: skip
        if not all(map(_agree, again, [out[part] for out in split_outputs])):
            raise ValueError(_ALONE.format(name or type(module).__name__, "gives other outputs"))
        rows.append(torch.stack([sqnorm(f) for f in upcast(*found)], 1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _gradients(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    leaves: list[Any],
    spec: Any,
    batched: Sequence[bool],
    gradients: Sequence[Tensor],
    uses: Sequence[int] | None,
    *,
    settings: Settings,
    name: str,
    vectorize: bool,
    training: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of all samples of a chunk, ``(B, *shape)`` each."""
    count = gradients[0].shape[0]
    wanted = [leaf(ordinary(p).unsqueeze(0).expand(count, *p.shape)) for p in parameters]
    tensors = [value for value, is_batched in zip(leaves, batched, strict=True) if is_batched]

    def one(values: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        own, carried = {id(p): v for p, v in zip(parameters, values, strict=True)}, iter(tensors)
        inner = [
            next(carried) if is_batched else value for value, is_batched in zip(leaves, batched, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(inner, spec)
        shadow = Shadow(module, lambda p: own.get(id(p), ordinary(p)), training=training)
        shadow.restore(settings)
        # The inputs come from behind the user's own hooks on the module, and its outputs from before them.
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            shadow.root.__dict__[table] = OrderedDict()
        with Steps({id(value): i for i, value in enumerate(values)}) as steps:
            outputs = floating(shadow.root(*args, **kwargs))
        if (
            uses is not None
            and not vectorize
            and any(many > 1 and many != steps.uses[i] for i, many in enumerate(uses))
        ):
            raise ValueError(
                _ALONE.format(name or type(module).__name__, "uses a parameter another number of times")
            )
        return outputs

    if vectorize:
        outputs = torch.func.vmap(one)(wanted, tensors)
    else:
        outputs = [out.unsqueeze(0) for out in one([w[0] for w in wanted], [t[0] for t in tensors])]
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    again = [out.detach() for out in outputs]
    if not pairs:
        return again, [torch.zeros_like(w) for w in wanted]
    reached, at = zip(*pairs, strict=True)
    found = torch.autograd.grad(reached, wanted, at, allow_unused=True)
    return again, [torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)]


def _agree(again: Tensor, output: Tensor) -> bool:
    """Whether two computations of one output differ by rounding at most: in half of its digits."""
    if not is_readable(again, output) or again.numel() == 0:
        return True
    tolerance = math.sqrt(torch.finfo(output.dtype).eps)
    again, output = (t.double().nan_to_num() for t in (again, output.reshape(again.shape)))
    return bool((again - output).abs().max() <= tolerance * output.abs().max())
