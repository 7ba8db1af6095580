"""One pass of a network to all that the estimators read: logits and named blocks."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import is_traced, original, outside_of_compilation, pytree
from fastgrad.batches import as_call, batch_size, take
from fastgrad.blocks.block import Block
from fastgrad.blocks.features import Features
from fastgrad.blocks.logits import Logits
from fastgrad.blocks.passes import Pass
from fastgrad.blocks.subject import Subject, watch
from fastgrad.engine.network import Network
from fastgrad.engine.shadow import ordinary

Inputs = Tensor | Mapping[str, Any]

# On a CPU a batch with a backward pass goes in pieces whose tensors, of about this many bytes, the next piece reuses.
_WORKING_SET = 640 << 20
_SAMPLES = 16


class Extraction:
    """From inputs to logits and the asked-for blocks, from one forward pass and as few backward passes as they need.

    The model is only read: it runs as a private copy in evaluation mode.

    Args:
        model: Any classifier; outputs as `fastgrad.gradients.features.logits_of` reads them.
        blocks: What to extract, see `fastgrad.blocks`.
        log: Whether squared norms are given as logarithms.

    Raises:
        ValueError: Two blocks have one name.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], *, log: bool = True) -> None:
        names = [block.name for block in blocks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"blocks must differ; {name!r} was there {names.count(name)} times")
        self.model, self.blocks, self.log = original(model), tuple(blocks), log
        self.known: Subject | None = None
        self._setup()

    def _setup(self) -> None:
        self._lock = threading.Lock()
        self._network = Network(self.model)
        self._shapes: dict[str, torch.Size] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without lock and plans, which are made anew: copies and pickles work."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_lock", "_network", "_shapes")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._setup()

    def __call__(self, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``(B, N)`` and blocks of a batch, a tensor or a mapping of the model's keyword arguments.

        Raises:
            ValueError: A block cannot be had of this network or input; the message says why.
        """
        # torch.compile cannot follow an extraction, which builds modules; `fastgrad.export` gives it a graph.
        return outside_of_compilation(self._run)(x)

    def _run(self, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        subject = self.subject(x)
        with torch.inference_mode(False):
            args, kwargs = arguments(x)
            samples = batch_size(args, kwargs)
            empty = isinstance(samples, int) and samples == 0
            if empty:
                # Blocks of no sample have the shapes of one.
                args, kwargs = pytree.tree_map_only(
                    Tensor, lambda t: t.new_zeros((1, *t.shape[1:])) if t.dim() else t, (args, kwargs)
                )
            piece = self._piece(subject, samples)
            if piece is None:
                logits, values = self._extract(subject, args, kwargs, 1 if empty else samples)
                return (logits[:0], {n: v[:0] for n, v in values.items()}) if empty else (logits, values)
            parts = []
            for start in range(0, samples, piece):
                index = slice(start, min(start + piece, samples))
                part_args, part_kwargs = take((args, kwargs), index, samples)
                parts.append(self._extract(subject, part_args, part_kwargs, index.stop - start))
        return torch.cat([logits for logits, _ in parts]), {
            name: torch.cat([values[name] for _, values in parts]) for name in parts[0][1]
        }

    def subject(self, x: Inputs) -> Subject:
        """What is known of the network and inputs like ``x``, watched at the first call.

        Raises:
            ValueError: A block cannot be had.
        """
        with self._lock:
            if self.known is None:
                with torch.inference_mode(False):
                    subject = watch(self.model, *arguments(x))
                for block in self.blocks:
                    refusal = block.refusal(subject)
                    if refusal is not None:
                        served = f"{type(self.model).__name__} with this input"
                        raise ValueError(
                            f"blocks must be ones that can be had of {served}; {block.name!r}: {refusal}"
                        )
                self.known = subject
            return self.known

    def of(self, blocks: Sequence[Block]) -> Extraction:
        """The extraction of other blocks from the same network, which is neither watched nor planned again."""
        other = Extraction(self.model, blocks, log=self.log)
        other.known, other._network, other._shapes = self.known, self._network, self._shapes
        return other

    def plain(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        """Logits and h ``(B, D)`` alone: one forward pass, no gradient; None where the model ends otherwise."""
        subject = self.subject(x)
        blocks = [Logits()] if subject.head is None else [Logits(), Features()]
        logits, values = self.of(blocks)(x)
        return logits, values.get("features")

    def _piece(self, subject: Subject, samples: int) -> int | None:
        """Samples at a time, or None for all."""
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        backward = any(block.signals(subject) for block in self.blocks)
        if not isinstance(samples, int) or device != "cpu" or not backward:
            return None
        piece = max(_SAMPLES, int(_WORKING_SET / max(1.0, 2 * subject.written)))
        # Pieces of equal size: a short last one would waste the most.
        piece = math.ceil(samples / max(1, math.ceil(samples / piece)))
        return None if piece >= samples else piece

    def _extract(
        self, subject: Subject, args: Any, kwargs: Any, samples: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        plan = None
        if any(block.signals(subject) for block in self.blocks):
            plan = self._network.plan(args, kwargs, samples)
        mask = None if subject.mask is None else kwargs[subject.mask]
        wants = {block.name: block.wants(subject, mask) for block in self.blocks}
        found = Pass(self._network, plan, subject, wants, args, kwargs, samples, log=self.log)
        with torch.no_grad():
            return found.logits, {block.name: self._values(block, found) for block in self.blocks}

    def _values(self, block: Block, found: Pass) -> Tensor:
        """A block's values; NaN, which no score takes for usual, where it fails after it has worked before."""
        try:
            values = block.values(found).detach()
        except Exception as error:
            shape = self._shapes.get(block.name)
            if shape is None or is_traced():
                raise
            warnings.warn(
                f"the block {block.name!r} failed on a batch, whose uncertainty is infinite: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return found.logits.new_full((found.samples, *shape), torch.nan)
        self._shapes[block.name] = values.shape[1:]
        return values


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments, outside any graph."""
    outside: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, ordinary, as_call(x))
    return outside
