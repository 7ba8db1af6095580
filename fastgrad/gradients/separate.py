"""Whether each of the losses of a batch depends on its own sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.engine.outputs import Place, flatten, split
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.sharded import names_of

#: Outputs of a recorded call, where the batch is in each, and whether it holds rows or is shared by all samples.
Outputs = Sequence[tuple[Tensor, Place, bool]]
#: Rounding that operations without a fixed order may add, in units of the dtype's epsilon.
UNITS = 16


def outputs_of(output: Any, recorded: Recorded) -> list[tuple[Tensor, Place, bool]]:
    """Return the numbers that a recorded call returned, with the place of the batch, and whether they have one."""
    leaves = zip(flatten(output)[0], recorded.places, recorded.rows, strict=True)
    return [
        (leaf, place, rows)
        for leaf, place, rows in leaves
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def require_own_parameters(model: nn.Module, losses: Tensor, outputs: Outputs) -> None:
    """Raise ValueError if ``losses`` reach a parameter of the model other than through its outputs."""
    places = {_edge(out) for out, _, _ in outputs if out.grad_fn is not None}
    names = names_of(model)
    waiting, seen = [_edge(losses)], set()
    while waiting:
        edge = waiting.pop()
        if edge in places or edge[0] in seen or edge[0] is None:
            continue
        seen.add(edge[0])
        waiting += edge[0].next_functions
        name = names.get(id(getattr(edge[0], "variable", None)))
        if name is not None:
            raise ValueError(
                f"losses must depend on parameters through the model's output alone; they reach {name!r} in another "
                "way, so no gradient per sample is known there"
            )


def require_separate(losses: Tensor, outputs: Outputs) -> None:
    """Raise ValueError unless ``losses[i]`` uses row i of the outputs alone, or outputs that have no gradient."""
    # A parameter among the outputs is behind the others as well; `require_own_parameters` finds other uses.
    reached = [each for each in outputs if each[0].requires_grad and not isinstance(each[0], nn.Parameter)]
    samples = losses.shape[0]
    # Powers of two scale without rounding: the gradient of a row that only its own loss uses scales exactly.
    exponents = torch.randint(1, 4, (samples,), generator=torch.Generator().manual_seed(0), device="cpu")
    exponents[:1] = 0
    factors = (2.0**exponents).to(losses)
    if not reached or not losses.requires_grad:
        raise ValueError("losses must be computed from the output of the model's latest call; they were not")
    given = [out for out, _, _ in reached]
    plain, scaled = (
        torch.autograd.grad([losses], given, [weights], retain_graph=True, allow_unused=True)
        for weights in (torch.ones_like(factors), factors)
    )
    found = [(*each, g, h) for each, g, h in zip(reached, plain, scaled, strict=True) if isinstance(g, Tensor)]
    if not found:
        raise ValueError("losses must be computed from the output of the model's latest call; they were not")
    for out, place, rows, g, h in found:
        if not rows:
            raise ValueError(
                "losses must be computed from outputs that carry the batch; they depend on one of shape "
                f"{tuple(out.shape)} that all samples share"
            )
        own, other = (split(x, place, samples).reshape(samples, -1) for x in (g, h))
        if own.is_complex():
            own, other = (torch.view_as_real(x).flatten(1) for x in (own, other))
        expected = own * factors.to(own).unsqueeze(1)
        allowed = UNITS * torch.finfo(own.dtype).eps * expected.abs().amax(1, keepdim=True)
        if bool(((other - expected).abs() > allowed).any()):
            raise ValueError(
                "losses must each depend on their own sample alone, in the order of the batch; the gradients of some "
                "rows of the model's output change with the weight of other samples' losses"
            )


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return the node of the autograd graph that made a tensor, and the number of the output there."""
    return tensor.grad_fn, tensor.output_nr
