"""Which inputs carry the batch, where the number of rows does not tell: a mask of B by B positions has B rows, too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgrad._torch import is_traced, pytree
from fastgrad.batches import carrying, take
from fastgrad.engine.copy import Shadow
from fastgrad.engine.fallback import agree
from fastgrad.engine.layout import SAMPLES
from fastgrad.engine.memory import lacks_memory
from fastgrad.engine.state import undone

if TYPE_CHECKING:
    from fastgrad.engine.network import Network

#: Inputs in doubt up to which every choice is tried.
_DOUBTS = 4


def find_carriers(network: Network, inputs: Any, samples: int, *, training: bool) -> tuple[bool, ...]:
    """For each leaf of the inputs, whether it carries the batch.

    The first tensor with B rows does. Of others with B rows, those do with which some of the samples alone give the
    rows that they have in the batch; where no choice does, as in a model that mixes samples, those that the model bears
    without an error. Where a module will run in training mode, the model must bear the choice in that mode as well.
    """
    leaves = pytree.tree_leaves(inputs)
    every = carrying(leaves, samples)
    _, *doubts = [i for i, carries in enumerate(every) if carries] or [0]
    # A tensor whose rows are as many as nothing else in the inputs has rows for samples.
    sizes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape[1:]]
    if not doubts or len(doubts) > _DOUBTS or samples not in sizes or is_traced():
        return every
    index = torch.arange(SAMPLES, device="cpu") % samples
    borne: tuple[bool, ...] | None = None
    batch = outputs_of(network, inputs)
    for count in range(len(doubts) + 1):
        for left_out in itertools.combinations(doubts, count):
            carriers = tuple(carries and i not in left_out for i, carries in enumerate(every))
            try:
                same = True
                for some in (index, index[:-1]):
                    part = take(inputs, some, samples, carriers)
                    same = _same_rows(outputs_of(network, part), batch, some) and same
                    if training:
                        outputs_of(network, part, training=True)
                if same:
                    return carriers
                borne = borne or carriers
            except Exception as error:
                if lacks_memory(error):
                    raise
    return borne or every


def outputs_of(network: Network, inputs: Any, *, training: bool = False) -> list[Tensor]:
    """What the model returns; it and the inputs are left as they were. It may take gradients, as of an energy."""
    with torch.enable_grad(), undone(network.model, inputs) as (args, kwargs):
        shadow = Shadow(network.model, training=training, recorded=network.recorded)
        return network.tensors(shadow(*args, **kwargs))


def _same_rows(some: Sequence[Tensor], batch: Sequence[Tensor], index: Tensor) -> bool:
    """Whether outputs of some samples are their rows of the batch's."""
    rows = [(part, whole[index.to(whole.device)]) for part, whole in zip(some, batch, strict=True) if whole.dim()]
    return all(part.shape == expected.shape and agree(part, expected) for part, expected in rows)
