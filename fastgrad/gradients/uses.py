"""A backward pass that hands over, parameter by parameter, what the recorded calls add to each sample's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastgrad.engine.backward import Backward, Share
from fastgrad.engine.products import ParameterUses
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.sharded import named_parameters
from fastgrad.gradients.recorder import calls_behind, record, summed
from fastgrad.layers.formula import Tensors
from fastgrad.ops.dispatch import full_precision

Take = Callable[[int, ParameterUses], None]


def calls_of_one_size(recording: record, outputs: Sequence[Tensor], name: str) -> list[Recorded]:
    """Return the recorded model's calls that outputs reach, all of one number of samples."""
    own = set(map(id, named_parameters(recording.model).values()))
    calls = [c for c in calls_behind(recording, outputs, name) if not c.samples or c.parameters.keys() & own]
    if not calls:
        raise ValueError(f"{name} must be computed from calls of the recorded model; those were calls of another one")
    sizes = sorted({call.samples for call in calls})
    if len(sizes) > 1:
        raise ValueError(
            f"{name} must be computed from calls of one number of samples; there were {' and '.join(map(str, sizes))}"
        )
    return calls


class UsesPass(Backward):
    """A backward pass that hands over all uses of a parameter as soon as they are complete."""

    def __init__(self, calls: Iterable[Recorded], wanted: Mapping[int, Tensor], outputs: Sequence[Tensor]) -> None:
        super().__init__(calls, wanted)
        self.outputs = outputs

    @torch.no_grad()
    def run(self, keep: bool, take: Take, *, at_once: bool = True) -> None:
        """Call ``take(id of a parameter, its side)``, with ``at_once`` within the backward pass if possible."""
        held: dict[int, list[Share]] = {}

        def give(key: int, shares: list[Share]) -> None:
            take(key, ParameterUses(self.wanted[key].shape, self.samples, shares))

        def see(n: int, saved: Tensors, gradients: Tensors) -> None:
            for key, share in self.shares(n, saved, gradients):
                if at_once and key not in self.several and len(share.rows) == self.samples:
                    give(key, [share])
                else:
                    held.setdefault(key, []).append(share)

        alone = self.back(see, self.outputs, summed(self.outputs), keep) if self.samples else []
        with full_precision(self.outputs[0].device):
            for key, share in alone:
                held.setdefault(key, []).append(share)
            for key, shares in held.items():
                give(key, shares)
