"""Which inputs carry the batch, where the number of rows does not tell: a mask of B by B positions has B rows, too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import is_traced, pytree
from fastgrad.batches import carrying, take
from fastgrad.engine.copy import Shadow, detach_plain
from fastgrad.engine.given import unwritten
from fastgrad.engine.layout import SAMPLES
from fastgrad.engine.memory import lacks_memory
from fastgrad.engine.state import undone

#: Inputs in doubt up to which every choice is tried.
_DOUBTS = 4


def find_carriers(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    samples: int,
    tensors: Callable[[Any], list[Tensor]],
    *,
    training: bool,
    recorded: bool = False,
) -> tuple[bool, ...]:
    """For each leaf of the inputs, whether it carries the batch.

    The first tensor with B rows does. Of others with B rows, those do with which some of the samples alone give the
    rows that they have in the batch; where no choice does, as in a model that mixes
    samples, those that the model bears without an error. Where a module will run in training mode, the model must bear
    the choice in that mode as well. ``tensors`` gives the tensors of an output that matter. ``recorded`` as in
    `fastgrad.engine.copy`.
    """
    inputs = pytree.tree_map_only(Tensor, detach_plain, (args, kwargs))
    leaves = pytree.tree_leaves(inputs)
    every = carrying(leaves, samples)
    _, *doubts = [i for i, carries in enumerate(every) if carries] or [0]
    # A tensor whose rows are as many as nothing else in the inputs has rows for samples.
    sizes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape[1:]]
    if not doubts or len(doubts) > _DOUBTS or samples not in sizes or is_traced():
        return every

    def outputs(inputs: Any, mode: bool = False) -> list[Tensor]:
        given = unwritten(inputs)
        with undone(model), torch.no_grad():
            return tensors(Shadow(model, training=mode, recorded=recorded).root(*given[0], **given[1]))

    index = torch.arange(SAMPLES, device="cpu") % samples
    batch: list[Tensor] | None = None
    borne: tuple[bool, ...] | None = None
    for count in range(len(doubts) + 1):
        for left_out in itertools.combinations(doubts, count):
            carriers = tuple(carries and i not in left_out for i, carries in enumerate(every))
            batch = outputs(inputs) if batch is None else batch
            try:
                parts = [(some, take(inputs, some, samples, carriers)) for some in (index, index[:-1])]
                found = [(some, outputs(part)) for some, part in parts]
                if training:
                    for _, part in parts:
                        outputs(part, True)
                if all(_same_rows(out, batch, some) for some, out in found):
                    return carriers
                borne = carriers if borne is None else borne
            except Exception as error:
                if lacks_memory(error):
                    raise
    return every if borne is None else borne


def _same_rows(some: Sequence[Tensor], batch: Sequence[Tensor], index: Tensor) -> bool:
    """Whether outputs of some samples are their rows of the batch's, in half of the digits."""
    for part, whole in zip(some, batch, strict=True):
        if whole.dim() == 0:
            continue
        expected = whole[index.to(whole.device)]
        tolerance = math.sqrt(torch.finfo(whole.dtype).eps)
        if part.shape != expected.shape or not torch.allclose(
            part, expected, rtol=0, atol=tolerance * float(expected.abs().amax()), equal_nan=True
        ):
            return False
    return True
