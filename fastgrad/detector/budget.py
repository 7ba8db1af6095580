"""Which blocks an answer is made of: what each costs, what each is worth, and what the budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.blocks import BLOCKS, BiasGradients, Block
from fastgrad.blocks.extraction import Inputs
from fastgrad.blocks.price import measure
from fastgrad.blocks.subject import Subject

if TYPE_CHECKING:
    from fastgrad.detector import UncertaintyDetector

#: Depths of the backward pass that are considered, the deepest affordable one being a candidate.
DEPTHS = (1.0, 0.5, 0.25, 0.125)
#: Inputs that prices are measured on, at most.
PRICED = 32
#: A prediction of a price this far above what is allowed rules a block out unmeasured.
_DOUBT = 1.5


@dataclass(frozen=True)
class Entry:
    """One block in a report.

    Attributes:
        block: Its name.
        predicted: Price beyond the forward pass, in forward passes, from counted operations.
        measured: The same, timed at `fit`; None where the block was ruled out before.
        worth: What AUROC, on kinds of challenge that training did not see, loses without it (for a block not kept:
            would gain with it); None where nothing was measured.
        interval: Half the width of the 95 % interval of ``worth`` over samples.
        kept: Whether the detector reads it.
        why: One phrase.
    """

    block: str
    predicted: float
    measured: float | None
    worth: float | None
    interval: float | None
    kept: bool
    why: str


@dataclass(frozen=True)
class Report:
    """What `TwoStageModel.fit` found; prints as a table.

    Attributes:
        entries: One a block.
        budget: In forward passes.
        price: Predicted and measured price of the blocks kept together, the forward pass included.
        auroc: Mean AUROC of the blocks kept over kinds of challenge left out of training; None where nothing was
            measured.
        seen: The blocks that H, which learns from challenges, reads; None for all.
        weight: How much H counts beside a one-class score; None for the detector's own rule.
    """

    entries: tuple[Entry, ...]
    budget: float
    price: tuple[float, float]
    auroc: float | None
    seen: tuple[str, ...] | None = None
    weight: float | None = None

    @property
    def kept(self) -> list[str]:
        """Names of the blocks that the detector reads."""
        return [entry.block for entry in self.entries if entry.kept]

    def fit(
        self,
        detector: UncertaintyDetector,
        X: Mapping[str, Tensor],
        kinds: NDArray[np.str_],
        groups: NDArray[np.intp],
        held_out: NDArray[np.bool_] | None = None,
    ) -> UncertaintyDetector:
        """A detector with the parameters of ``detector``, fitted on the blocks that are kept.

        Args:
            detector: Gives the parameters.
            X: Every block of all samples.
            kinds: Of all samples; empty for clean ones.
            groups: As for `UncertaintyDetector.fit`.
            held_out: Likewise.
        """
        from sklearn.base import clone

        fresh: UncertaintyDetector = clone(detector)
        if self.seen is not None:
            fresh.set_params(sees=self.seen, weight=self.weight)
        return fresh.fit(
            {name: X[name] for name in self.kept},
            (kinds != "").astype(int),
            kinds=kinds,
            held_out=held_out,
            groups=groups,
        )

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        budget = self.budget if math.isfinite(self.budget) else None
        return {**asdict(self), "budget": budget}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        return cls(
            tuple(Entry(**entry) for entry in stored["entries"]),
            math.inf if stored["budget"] is None else stored["budget"],
            (stored["price"][0], stored["price"][1]),
            stored["auroc"],
            None if stored["seen"] is None else tuple(stored["seen"]),
            stored["weight"],
        )

    def __str__(self) -> str:
        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        lines = [f"{'block':20} {'predicted':>9} {'measured':>9} {'worth':>15} {'kept':>5}  why"]
        for entry in self.entries:
            worth = number(entry.worth, "+.3f")
            if entry.interval is not None:
                worth += f" +-{entry.interval:.3f}"
            lines.append(
                f"{entry.block:20} {entry.predicted:9.2f} {number(entry.measured, '.2f'):>9} {worth:>15} "
                f"{'yes' if entry.kept else 'no':>5}  {entry.why}"
            )
        lines.append(
            f"all kept: {self.price[0]:.2f} forward passes predicted, {self.price[1]:.2f} measured; "
            f"budget {self.budget:g}"
        )
        if self.auroc is not None:
            lines.append(f"AUROC on kinds of challenge left out of training: {self.auroc:.3f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Candidates:
    """Blocks that can be had within the budget, and what they cost.

    Attributes:
        blocks: The candidates.
        entries: Those and the ones ruled out.
        budget: In forward passes.
        together: Measured price of all candidates in one extraction.
        fixed: Whether the blocks were asked for, so that all are kept.
    """

    blocks: list[Block]
    entries: tuple[Entry, ...]
    budget: float
    together: float
    fixed: bool

    def choose(
        self,
        detector: UncertaintyDetector,
        X: Mapping[str, Tensor],
        kinds: NDArray[np.str_],
        held_out: NDArray[np.bool_],
        *,
        own: bool,
    ) -> Report:
        """Keep the set that is worth most within the budget.

        Args:
            detector: Says how scores are fitted and joined.
            X: Every candidate of all samples.
            kinds: Of all samples; empty for clean ones.
            held_out: Clean samples that calibrate, challenging ones that judge.
            own: Whether the challenging samples are the user's own: then what helps on them counts, and kinds are
                not left out of training.
        """
        from fastgrad.detector.worth import GENERATED, OWN, Judge

        names = [block.name for block in self.blocks]
        price = {entry.block: self._price(entry) for entry in self.entries}
        allowance = self.budget - 1
        if self.fixed or not (kinds != "").any():
            kept = names if self.fixed else _without_challenges(names, price, allowance)
            why = "asked for" if self.fixed else "no challenges to measure its worth on"
            return self._report(kept, {}, None, why)
        choice = Judge(detector, X, kinds, held_out, own=own).choose(names, price, allowance)
        weight = OWN if own else GENERATED
        return self._report(choice.kept, choice.worth, choice.auroc, "", choice.seen, weight)

    @staticmethod
    def _price(entry: Entry) -> float:
        """What decides: the smaller of prediction and measurement, since a busy machine only adds to the second."""
        return entry.predicted if entry.measured is None else min(entry.predicted, entry.measured)

    def _report(
        self,
        kept: Sequence[str],
        worth: Mapping[str, tuple[float, float]],
        auroc: float | None,
        why: str,
        seen: Sequence[str] | None = None,
        weight: float | None = None,
    ) -> Report:
        entries = []
        for entry in self.entries:
            gain, interval = worth.get(entry.block, (None, None))
            if entry.why:
                reason = entry.why
            elif gain is None:
                reason = why
            elif entry.block not in kept:
                reason = "not worth its price"
            else:
                assert interval is not None  # it comes with the gain
                reason = "worth its price" if gain > interval else "worth it elsewhere, not clearly so here"
                if seen is not None and entry.block not in seen:
                    reason += ", by its own score alone"
            entries.append(
                replace(entry, worth=gain, interval=interval, kept=entry.block in kept, why=reason)
            )
        inside = [entry for entry in entries if entry.kept]
        predicted = 1 + sum(entry.predicted for entry in inside)
        everything = len(inside) == len(self.blocks)
        measured = 1 + (self.together if everything else sum(entry.measured or 0.0 for entry in inside))
        return Report(
            tuple(entries),
            self.budget,
            (predicted, measured),
            auroc,
            None if seen is None else tuple(seen),
            weight,
        )


def _without_challenges(names: Sequence[str], price: Mapping[str, float], allowance: float) -> list[str]:
    """Blocks whose one-class scores have been worth most, as long as the budget lasts."""
    kept: list[str] = []
    for name in (
        "logits",
        "activations",
        "features",
        "image",
        "view",
        "bias_gradients",
    ):
        if name in names and sum(price[other] for other in kept) + price[name] <= allowance:
            kept.append(name)
    return kept


def candidates(
    model: nn.Module, subject: Subject, x: Inputs, budget: float, asked: Sequence[Block] | None
) -> Candidates:
    """Price the blocks that were asked for, or all that the network and the input can serve.

    Args:
        model: The network.
        subject: What is known of it.
        x: A batch on its device.
        budget: In forward passes.
        asked: Blocks that must be had, whatever they cost; None for all.

    Raises:
        ValueError: A block that was asked for cannot be had; the message says which can.
    """
    every = _every(subject, budget) if asked is None else list(asked)
    refusals = {block.name: block.refusal(subject) for block in every}
    if asked is not None and any(refusals.values()):
        name, why = next((name, why) for name, why in refusals.items() if why)
        possible = ", ".join(repr(n) for n, kind in BLOCKS.items() if kind().refusal(subject) is None)
        raise ValueError(f"blocks must be ones that can be had here, {possible}; {name!r}: {why}")
    predicted = {block.name: block.price(subject) for block in every}
    able = [
        block
        for block in every
        if refusals[block.name] is None
        and (asked is not None or predicted[block.name] <= _DOUBT * (budget - 1))
    ]
    measured, together = measure(model, subject, able, _some(x))
    entries = []
    for block in every:
        why = refusals[block.name] or ("" if block in able else "beyond the budget")
        entries.append(
            Entry(block.name, predicted[block.name], measured.get(block.name), None, None, False, why)
        )
    return Candidates(able, tuple(entries), budget, together, asked is not None)


def _every(subject: Subject, budget: float) -> list[Block]:
    """One block of every kind, backward passes as deep as the budget allows."""
    deepest = next(
        (depth for depth in DEPTHS if BiasGradients(depth).price(subject) <= budget - 1),
        DEPTHS[-1],
    )
    return [BiasGradients(deepest) if kind is BiasGradients else kind() for kind in BLOCKS.values()]


def _some(x: Inputs) -> Inputs:
    if isinstance(x, Tensor):
        return x[:PRICED]
    return {name: value[:PRICED] if isinstance(value, Tensor) else value for name, value in x.items()}
