"""Inner products of per-sample gradients, and sums of their squares, from one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import outside_of_compilation
from fastgrad.engine.products import CHUNK_BYTES, ParameterUses, abs_sum, gram, square_sum
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.sharded import whole
from fastgrad.gradients.recorder import Params, active, parameters_given, parameters_of, record
from fastgrad.gradients.uses import UsesPass, calls_of_one_size
from fastgrad.losses import compute_dtype
from fastgrad.memory import lacks_memory

_Outputs = Tensor | Sequence[Tensor]


@overload
def grad_gram(
    losses: _Outputs, params: Params, *, each: Literal[False] = ..., other: _Outputs | None = ...,
    retain_graph: bool | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def grad_gram(
    losses: _Outputs, params: Params, *, each: Literal[True], other: _Outputs | None = ...,
    retain_graph: bool | None = ...,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def grad_gram(
    losses: Tensor | Sequence[Tensor], params: Params, *, each: bool = False,
    other: Tensor | Sequence[Tensor] | None = None, retain_graph: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Return the exact inner products of all pairs of samples' gradients, without storing the gradients.

    Entry (i, j) is ``<g_i, g_j>``, summed over ``params``. A linear function's share is ``(A A^T) * (D D^T)``, from
    inputs A and output gradients D. With several positions, either products of positions are taken or gradients are
    formed for a part of the parameter at a time, whichever is cheaper. Samples that ran alone keep their gradients.

    Args:
        losses: As in `grad_sqnorm`: ``(B,)``, their sum, or any tensors computed from the recorded model's outputs.
        params: As in `grad_sqnorm`.
        each: Whether to return one matrix per parameter instead of their sum.
        other: Losses of another call of the model, with B' samples, or another loss of the same call: columns are
            then its samples.
        retain_graph: Whether to keep the graphs for another call.

    Returns:
        ``(B, B)`` or ``(B, B')``, or a tuple of them, one per parameter: float32 (float64 for a float64 model). Errors
        are roundings relative to ``||g_i|| ||g_j||``. Zeros for parameters that one side does not depend on.

    Raises:
        RuntimeError: Outside of ``record``, or if no recorded call leads to ``losses`` or to ``other``.
        ValueError: As `grad_sqnorm`, and if the calls behind one side have different numbers of samples, or are of
            another model than the one that was recorded last.
        MemoryError: If the results do not fit into memory.

    Example::

        with fastgrad.record(model):
            losses = F.cross_entropy(model(x), y, reduction="none")
            gram = fastgrad.grad_gram(losses, model)
    """
    recording = active("grad_gram")
    first, wanted = checks.tensors("losses", losses), parameters_given(params)
    second = None if other is None else checks.tensors("other", other)
    compute = outside_of_compilation(_grams)
    wanted = whole(recording.model, wanted)
    found = compute(recording, first, wanted, second, each, bool(retain_graph))
    return tuple(found[id(p)] for p in wanted) if each else found[0]


def _grams(
    recording: record, outputs: Sequence[Tensor], wanted: Sequence[Tensor], other: Sequence[Tensor] | None, each: bool,
    keep: bool,
) -> dict[int, Tensor]:  # fmt: skip
    """Return matrices by the ids of parameters, or with key 0 their sum."""
    asked = parameters_of(recording, wanted)
    row = UsesPass(calls_of_one_size(recording, outputs, "losses"), asked, outputs)
    column = row if other is None else UsesPass(calls_of_one_size(recording, other, "other"), asked, other)
    keys, dtype = list(asked) if each else [0], compute_dtype(*(p.dtype for p in wanted))
    devices = {key: asked.get(key, wanted[0]).device for key in keys}
    held: dict[int, ParameterUses] = {}
    try:
        sums = {key: torch.zeros(row.samples, column.samples, dtype=torch.float64, device=devices[key]) for key in keys}

        def add(key: int, found: Tensor) -> None:
            at = key if each else 0
            sums[at] += found.to(sums[at].device)

        if column is row:
            row.run(keep, lambda key, side: add(key, gram(side)))
        else:
            # The side of fewer samples waits for the other's gradients.
            waits, comes = (row, column) if row.samples <= column.samples else (column, row)
            shared = {id(call) for call in row.calls} & {id(call) for call in column.calls}
            waits.run(keep or bool(shared), held.__setitem__, at_once=False)

            def meet(key: int, side: ParameterUses) -> None:
                if key in held:
                    found = gram(held[key], side)
                    add(key, found if waits is row else found.mT)

            comes.run(keep, meet)
    except Exception as error:
        if not lacks_memory(error):
            raise
        kept = (t.nbytes for side in held.values() for share in side.shares for t in (*share.saved, *share.gradients))
        raise MemoryError(
            f"losses must have so few samples that inner products fit into memory; those of {row.samples} and "
            f"{column.samples} samples take {len(keys) * row.samples * column.samples * 8} bytes, and work on them "
            f"about {2 * CHUNK_BYTES + sum(kept)} more"
        ) from error
    return {key: total.to(compute_dtype(asked[key].dtype) if each else dtype) for key, total in sums.items()}


def grad_square_sum(
    losses: Tensor | Sequence[Tensor],
    params: Params,
    *,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Return each parameter's sum over samples of squared gradients, the diagonal of the empirical Fisher matrix.

    Laplace approximations and elastic weight consolidation take it. The sum of a result is that of `grad_sqnorm`.

    Args:
        losses: As in `grad_sqnorm`.
        params: As in `grad_sqnorm`.
        retain_graph: Whether to keep the graph for another call.

    Returns:
        One tensor of its own shape per parameter, float32 (float64 for float64); zeros if losses do not depend on it.

    Raises:
        RuntimeError: As `grad_sqnorm`.
        ValueError: As `grad_gram`.
    """
    recording = active("grad_square_sum")
    first, wanted = checks.tensors("losses", losses), parameters_given(params)
    wanted = whole(recording.model, wanted)
    found = outside_of_compilation(_square_sums)(recording, first, wanted, bool(retain_graph))
    return tuple(found[id(p)] for p in wanted)


def _square_sums(
    recording: record, outputs: Sequence[Tensor], wanted: Sequence[Tensor], keep: bool
) -> dict[int, Tensor]:
    asked = parameters_of(recording, wanted)
    sums = {key: torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False) for key, p in asked.items()}

    def add(key: int, side: ParameterUses) -> None:
        sums[key] += square_sum(side).to(sums[key])

    UsesPass(calls_of_one_size(recording, outputs, "losses"), asked, outputs).run(keep, add)
    return sums


def abs_sums(call: Recorded, losses: Tensor, wanted: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the L1 norms ``(B,)`` of each sample's gradients, by the ids of parameters that ``losses`` depend on."""
    sums: dict[int, Tensor] = {}

    def put(key: int, side: ParameterUses) -> None:
        sums[key] = abs_sum(side)

    UsesPass([call], wanted, [losses]).run(False, put)
    return sums
