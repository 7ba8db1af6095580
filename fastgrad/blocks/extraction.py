"""One pass of a network to all that the estimators read: logits, last features, gradient features."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import functional
from fastgrad.batches import as_call, batch_size, class_logits, logits_of
from fastgrad.blocks.image_statistics import image_statistics, is_image
from fastgrad.checks import one_of
from fastgrad.engine.network import Network
from fastgrad.engine.run import Run
from fastgrad.engine.shadow import Shadow, attach, uncompiled
from fastgrad.engine.sites import Reading
from fastgrad.features import GradientFeatures

GRADIENTS = ("auto", "contrasts", "signals", "last_layer")
#: The joined signals: three gradients that say different things about a sample.
SIGNALS = (("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted"))
#: Contrast classes of highest logit that go through the whole network.
RANKS = 10


class Extraction:
    """From inputs to logits and named blocks for `UncertaintyDetector`.

    Blocks: ``logits`` ``(B, N)``; ``features`` ``(B, D)``, what enters the last linear layer, where the model
    has one; ``image`` ``(B, 28)``, `image_statistics` of the input where it is one image tensor;
    ``gradients`` ``(B, 3, P)``, the joined signals; ``ranked`` ``(B, K, P)``, the contrasts of the K classes
    of highest logit through the whole network, in order of rank. With ``"last_layer"``: ``contrasts``
    ``(B, N)`` in place of the last two.

    Args:
        model: Any classifier; outputs as `fastgrad.batches.logits_of` reads them.
        gradients: ``"signals"``, three backward passes, also meant by ``"auto"``; ``"contrasts"``, which adds
            ``ranked`` at four times the backward passes; or ``"last_layer"``, without any backward pass.
        log: Whether squared norms are given as logarithms.
        head: Name of the last linear layer; found by the first call when None.
    """

    def __init__(
        self, model: nn.Module, gradients: str = "auto", *, log: bool = True, head: str | None = None
    ) -> None:
        one_of("gradients", gradients, GRADIENTS)
        self.model = uncompiled(model)
        self.gradients = gradients
        self.log = log
        self.head = head
        self.classes: int | None = None
        self._lock = threading.Lock()
        self._extractor: GradientFeatures | None = None

    def __call__(self, x: Tensor | Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``(B, N)`` and blocks of a batch, a tensor or a mapping of the model's keyword arguments."""
        args, kwargs = as_call(x)
        self._prepare(args, kwargs)
        blocks: dict[str, Tensor] = {}
        if self.gradients == "last_layer":
            logits, features = self._forward(args, kwargs)
            assert features is not None  # _prepare found the head
            bias = getattr(self.model.get_submodule(self.head or ""), "bias", None) is not None
            blocks["contrasts"] = functional.contrast_sqnorm(features, logits, bias=bias, log=self.log)
        else:
            assert self._extractor is not None  # made by _prepare
            logits, norms, readings = self._extractor.extract(args, kwargs, readings=self._readings())
            features = next(iter(readings.values()), None)
            blocks["gradients"] = norms[:, self.ranks :]
            if self.ranks:
                blocks["ranked"] = norms[:, : self.ranks]
        if features is not None:
            blocks["features"] = features
        images = [value for value in (*args, *kwargs.values()) if is_image(value)]
        if len(images) == 1:
            with torch.no_grad():
                blocks["image"] = image_statistics(images[0])
        return logits, {"logits": logits, **blocks}

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock and the extractor, which the next call makes anew: copies and pickles work."""
        return self.__dict__ | {"_lock": None, "_extractor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def plain(self, x: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Logits and penultimate features alone: one forward pass, no gradient."""
        args, kwargs = as_call(x)
        self._prepare(args, kwargs)
        return self._forward(args, kwargs)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            if self.classes is None:
                head, self.classes = find_head(self.model, *args, **kwargs)
                self.head = self.head or head
                if self.head is None and self.gradients == "last_layer":
                    raise ValueError(
                        "gradients='last_layer' needs a model that ends in a linear layer; "
                        f"none of {type(self.model).__name__}'s gave its logits"
                    )
            if self._extractor is None and self.gradients != "last_layer":
                signals: list[tuple[str, Any]] = list(SIGNALS)
                if self.ranks:
                    signals = [
                        ("cross_entropy", functools.partial(class_of_rank, rank=rank))
                        for rank in range(self.ranks)
                    ] + signals
                self._extractor = GradientFeatures(self.model, signals=signals, log=self.log)

    @property
    def ranks(self) -> int:
        """How many contrasts go through the whole network."""
        if self.classes is None:
            raise RuntimeError("the number of classes is known after the first call")
        return min(RANKS, self.classes) if self.gradients == "contrasts" else 0

    def _readings(self) -> list[Reading]:
        """What enters the last linear layer, where there is one."""
        return [] if self.head is None else [Reading(self.head, _first_input)]

    def _forward(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
        run = Run(batch_size(args, kwargs))
        with torch.no_grad():
            output = Network(self.model).forward(None, run, args, kwargs, readings=self._readings())
        return logits_of(output).detach(), next(iter(run.readings.values()), None)


def _first_input(inputs: tuple[Any, ...], _: Any) -> Tensor:
    value: Tensor = inputs[0]
    return value


def class_of_rank(logits: Tensor, rank: int) -> Tensor:
    """The class of the given rank, 0 for the predicted one: ``(B, N)`` to ``(B,)``."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, rank]


def find_head(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[str | None, int]:
    """Name of the linear layer that gave the logits, and their number.

    It is the last layer called whose output equals the logits and whose input is one row ``(B, D)`` a sample;
    None where there is no such layer. The model itself is left as it was.
    """
    shadow = Shadow(model)
    seen: list[tuple[str, tuple[int, ...], Tensor]] = []

    def watch(path: str, copy: nn.Module) -> None:
        def leave(_: nn.Module, inputs: Any, __: Any, output: Any) -> None:
            if inputs and isinstance(output, Tensor):
                seen.append((path, tuple(inputs[0].shape), output))

        attach(copy, leave)

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            watch(path, shadow.modules[id(module)])
    with torch.no_grad():
        logits = class_logits(shadow.root(*args, **kwargs))
    for path, shape, output in reversed(seen):
        same = output.shape == logits.shape and len(shape) == 2
        if same and torch.equal(output.to(logits.dtype), logits):
            return path, logits.shape[1]
    return None, logits.shape[1]
