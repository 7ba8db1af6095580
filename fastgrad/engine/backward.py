"""Backpropagate output gradients through a forward pass and collect the gradients of its probes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastgrad._torch import is_fake, vmap
from fastgrad.engine.fallback import FallbackSite
from fastgrad.engine.probe import requesting_norms
from fastgrad.engine.refusals import refuse_untracked
from fastgrad.engine.run import RecomputedSite, Run, Site
from fastgrad.engine.tracing import is_symbolic
from fastgrad.losses import compute_dtype


def probe_grads(
    outputs: Sequence[Tensor],
    probes: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    *,
    batched: bool = False,
    looped: bool = False,
    keep: bool | None = None,
) -> list[Tensor | None]:
    """Return the gradient ``(B, m)`` of each probe, as `torch.autograd.grad`, and compute no norms of other probes.

    The pass goes back to the earliest of the probes, which may belong to several runs. A probe that the outputs do not
    depend on gives None. ``batched`` gradients have a leading dimension S, and so has the result; they go back
    together, unless ``looped``. ``keep`` keeps the graph for another call.
    """
    if not probes:
        return []

    def back(grads: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        return torch.autograd.grad(outputs, probes, grads, retain_graph=keep, allow_unused=True)

    with requesting_norms(probes):
        if not batched:
            return list(back(gradients))
        assert gradients is not None
        count = gradients[0].shape[0]
        if looped or count == 1:
            rows = [
                probe_grads(outputs, probes, [g[i] for g in gradients], keep=keep or i < count - 1)
                for i in range(count)
            ]
            # A probe has gradients for all output gradients or for none.
            return [
                None if first is None else torch.stack([first, *rest]) if rest else first.unsqueeze(0)
                for first, *rest in zip(*rows, strict=True)
            ]
        reached: list[int] = []

        def some(*grads: Tensor) -> list[Tensor]:
            found = {i: g for i, g in enumerate(back(grads)) if g is not None}
            reached.extend(found)
            return list(found.values())

        values = dict(zip(reached, vmap(some)(*gradients), strict=True))
        return [values.get(i) for i in range(len(probes))]


def looped(runs: Iterable[Run], sites: Sequence[Site], output: Tensor) -> bool:
    """Whether several gradients must go back one after the other, because functorch's batched tensors cannot be used.

    They cannot be traced with a symbolic batch, nor where a replay differentiates. A replay that compares gradients
    must read their values. Autograd functions that a checkpoint repeats may fail on them. Trials find the rest.
    """
    return (
        any(is_symbolic(run.samples) or run.one_by_one or (run.plan and run.plan.looped) for run in runs)
        or any(isinstance(site, FallbackSite) and site.verify for site in sites)
        or (is_fake(output) and any(isinstance(site, RecomputedSite) for site in sites))
    )


def backward_signals(run: Run, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, keep: bool = False) -> Tensor:
    """Send S gradients ``(S, B, ...)`` of each output of a run back; return squared norms of its plan's parameters.

    They are ``(S, B, P)``, float32 (float64 for float64 gradients); zero if the outputs do not depend on a parameter.
    """
    assert run.plan is not None
    sites, probes = [site for site, _ in run.probes], [probe for _, probe in run.probes]
    signals: list[Tensor | None] = [None] * len(probes)
    pairs = [(out, at) for out, at in zip(outputs, gradients, strict=True) if out.requires_grad]
    if pairs:
        reached, at = zip(*pairs, strict=True)
        one_by_one = looped([run], sites, reached[0])
        signals = probe_grads(reached, probes, at, batched=True, looped=one_by_one, keep=keep)
    like, dtype = gradients[0], compute_dtype(gradients[0].dtype)
    served = [(site.parameters, f) for site, f in zip(sites, signals, strict=True) if f is not None]
    columns = [name for parameters, _ in served for name in parameters]
    place = {name: i for i, name in enumerate(columns)}
    zeros = like.new_zeros((like.shape[0], run.samples, 1), dtype=dtype)
    parts = [f.to(device=like.device, dtype=dtype) for _, f in served]
    order = torch.tensor([place.get(name, len(columns)) for name in run.plan.routes], device=like.device)
    return torch.cat([*parts, zeros], -1).index_select(-1, order)


@torch.no_grad()
def signal_sqnorms(run: Run, output: Tensor, delta: Tensor, *, log: bool = False, keep: bool = False) -> Tensor:
    """Return squared norms ``(S, B, P)`` of gradients of a plan's parameters, or logarithms, finite even for zeros.

    ``delta`` ``(S, B, N)`` holds S gradients of a run's output, in float64 for ``log``, as their squares may underflow.
    ``keep`` keeps the graph for another call. Raise ValueError if the pass used parameters other than through modules.
    """
    assert run.plan is not None
    refuse_untracked(run.plan.untracked)
    # If the backward pass is linear in delta, scaling delta to unit size keeps every intermediate square in range.
    scale = delta.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    if not run.plan.linear:
        scale = torch.ones_like(scale)
    unit = (delta / scale).to(output.dtype)
    with torch.enable_grad():
        norms = backward_signals(run, [output], [unit], keep=keep)
    if log:
        return norms.clamp_min(torch.finfo(norms.dtype).tiny).log() + (2 * scale.log()).to(norms.dtype)
    scale = scale.to(norms.dtype)
    # In this order, no intermediate product leaves the dtype's range if the result is within it.
    return norms * scale * scale
