"""Whether each loss depends on its own sample alone: then, and only then, a factor on the loss clips that sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.engine.layout import Layout

#: Rounding, in units of the dtype's precision, that operations of no fixed order may add.
_UNITS = 16


def require_separate(
    model: nn.Module, losses: Tensor, outputs: Sequence[Tensor], layouts: Sequence[Layout | None]
) -> None:
    """Raise ValueError unless ``losses[i]`` is made of row i of the outputs, and of parameters through them alone.

    Args:
        model: Its parameters count.
        losses: ``(B,)``.
        outputs: The floating-point tensors in the model's output.
        layouts: Where the batch lies in each.
    """
    places = {_edge(out): i for i, out in enumerate(outputs) if out.grad_fn is not None}
    names = {id(p): name for name, p in model.named_parameters()}
    reached = set()
    waiting, seen = [_edge(losses)], set()
    while waiting:
        edge = waiting.pop()
        if edge in places:
            reached.add(places[edge])
        elif edge[0] not in seen and edge[0] is not None:
            seen.add(edge[0])
            waiting += edge[0].next_functions
            variable = getattr(edge[0], "variable", None)
            if id(variable) in names:
                raise ValueError(
                    f"losses must depend on parameters through the model's output alone; they reach "
                    f"{names[id(variable)]!r} in another way, so no gradient per sample is known there"
                )
    if not reached:
        raise ValueError("losses must be computed from the output of the model's latest call; they were not")
    # Powers of two scale without rounding: a sample's gradient that is its own is scaled by exactly its own factor.
    samples = losses.shape[0]
    exponents = torch.randint(1, 4, (samples,), generator=torch.Generator().manual_seed(0))
    exponents[:1] = 0
    factors = (2.0**exponents).to(losses)
    ordered = [(outputs[i], layouts[i]) for i in sorted(reached)]
    plain, scaled = (
        torch.autograd.grad([losses], [out for out, _ in ordered], [weights], retain_graph=True)
        for weights in (torch.ones_like(factors), factors)
    )
    for (out, layout), g, h in zip(ordered, plain, scaled, strict=True):
        if layout is None or layout.kind == "single":
            raise ValueError(
                "losses must be computed from outputs that carry the batch in one dimension; they depend on one of "
                f"shape {tuple(out.shape)}, in which it was not found"
            )
        own, other = (layout.batch_first(x, samples).flatten(1) for x in (g, h))
        expected = own * factors.to(own).unsqueeze(1)
        allowed = _UNITS * torch.finfo(own.dtype).eps * expected.abs().amax(1, keepdim=True)
        if bool(((other - expected).abs() > allowed).any()):
            raise ValueError(
                "losses must each depend on their own sample alone, in the order of the batch; the gradients of some "
                "rows of the model's output change with the weight of other samples' losses"
            )


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """The place in the graph of gradients where a tensor was made."""
    return tensor.grad_fn, tensor.output_nr
