"""Network, extraction, introspective classifier and detector as one module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad.blocks.extraction import Extraction
from fastgrad.challenges import challenge_names, iter_challenges
from fastgrad.losses import compute_dtype

if TYPE_CHECKING:
    from fastgrad.estimators import IntrospectiveClassifier, UncertaintyDetector
    from fastgrad.estimators.combined import DetectorModule
    from fastgrad.estimators.introspective import IntrospectiveNetwork

Inputs = Tensor | Mapping[str, Any]


class Prediction(NamedTuple):
    """What the network says, and how far to trust it.

    Attributes:
        logits: ``(B, N)``, the network's own.
        probabilities: ``(B, N)``, of the introspective classifier where there is one, else the softmax.
        uncertainty: ``(B,)``, higher is less reliable: -log of the probability that a clean input looks at
            least so unusual; infinite where it cannot be computed.
    """

    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor


class TwoStageModel(nn.Module):
    """A trained classifier that also says how far each of its predictions can be trusted.

    Torchvision, timm and Hugging Face classifiers work as they are. The network is only read: it runs in
    evaluation mode, and its mode, gradients and hooks stay what they were.

    Args:
        model: The trained network; from a batch, or a mapping of keyword arguments, to logits ``(B, N)``,
            given as a tensor, as ``.logits`` or first in a tuple.
        detector: An `UncertaintyDetector`, fitted or not; None for the default one.
        classifier: An `IntrospectiveClassifier` to give the probabilities; None for the network's softmax.
        gradients: What the detector sees, see `fastgrad.blocks.extraction.Extraction`: ``"auto"``, which means
            ``"signals"``, ``"contrasts"`` (more thorough, four times the backward passes) or
            ``"last_layer"`` (no backward pass).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        detector: UncertaintyDetector | None = None,
        classifier: IntrospectiveClassifier | None = None,
        gradients: str = "auto",
    ) -> None:
        from fastgrad.estimators import IntrospectiveClassifier, UncertaintyDetector

        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; it was {type(model).__name__}")
        if detector is not None and not isinstance(detector, UncertaintyDetector):
            raise TypeError(
                f"detector must be an UncertaintyDetector or None; it was a {type(detector).__name__}"
            )
        if classifier is not None and not isinstance(classifier, IntrospectiveClassifier):
            raise TypeError(
                f"classifier must be an IntrospectiveClassifier or None; it was {type(classifier).__name__}"
            )
        self.model = model
        self.detector = UncertaintyDetector(log=False) if detector is None else detector
        self.classifier = classifier
        self.extraction = Extraction(model, gradients, log=not self.detector.log)
        self.detector_module: DetectorModule | None = None
        self.classifier_module: IntrospectiveNetwork | None = None

    def forward(self, x: Inputs) -> Prediction:
        """Predict a batch.

        Args:
            x: What the network takes, ``(B, ...)``, or a mapping of its keyword arguments.

        Raises:
            RuntimeError: Before `fit`.
        """
        detector = self._fitted()
        logits, blocks = self.extraction(x)
        with torch.no_grad():
            if self.classifier_module is None:
                probabilities = logits.to(compute_dtype(logits.dtype)).softmax(-1)
            else:
                probabilities = self._introspect(blocks["features"], logits)
            score = detector(blocks)
            # A comparison with NaN is false, and would pass for reliable.
            score = torch.where(torch.isnan(score), torch.inf, score)
        return Prediction(logits, probabilities, score.to(compute_dtype(logits.dtype)))

    def fit(
        self,
        train_loader: Iterable[Any],
        challenge_loader: Iterable[Any] | None = None,
        *,
        calibration_loader: Iterable[Any] | None = None,
        max_samples: int = 5000,
        challenges_per_image: int = 2,
        seed: int = 0,
        verbose: bool = False,
    ) -> TwoStageModel:
        """Fit the detector, and the introspective classifier where there is one.

        Args:
            train_loader: Batches of clean inputs, ``x`` or ``(x, labels)``; labels are needed for the
                classifier only. Clean data that the network was not trained on is better: it is more certain
                of its training data than of anything else.
            challenge_loader: Batches of challenging inputs, ``x`` or ``(x, kinds)``; None generates them from
                the clean images (`fastgrad.challenges`); ``()`` fits on clean data alone.
            calibration_loader: Clean batches that the network was not trained on, from which false-alarm
                rates are calibrated; None holds out two fifths of ``train_loader``.
            max_samples: Clean inputs that the detector is fitted on, at most; also challenging ones, times
                ``challenges_per_image``.
            challenges_per_image: How many generated challenges come from one clean image.
            seed: Of the held-out part and the challenges.
            verbose: Whether to show progress bars.

        Returns:
            The module itself.

        Raises:
            ValueError: A loader is empty or malformed, or challenges cannot be made from the inputs.
        """
        if max_samples < 4:
            raise ValueError(f"max_samples must be at least 4; it was {max_samples}")
        rng = np.random.default_rng(seed)
        names = [] if challenge_loader is not None else challenge_names()
        share = self.detector.calibration_fraction if calibration_loader is None else 0.0
        parts: list[dict[str, Tensor]] = []
        kinds: list[str] = []
        held_out: list[bool] = []
        turn = count = 0
        for x in _bar(_inputs("train_loader", train_loader), "clean", verbose):
            x = _take(x, slice(0, max_samples - count))
            size = _length(x)
            kept = rng.random(size) < share
            self._add(parts, kinds, held_out, x, "", kept)
            count += size
            free = torch.as_tensor(np.flatnonzero(~kept))
            if names and len(free):
                if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
                    raise ValueError(
                        "challenges can be generated from images (B, C, H, W) only; pass challenge_loader or "
                        "challenge_loader=() to fit on clean data alone"
                    )
                chosen = [names[(turn + i) % len(names)] for i in range(challenges_per_image)]
                turn += challenges_per_image
                for name, made in self._challenges(x, free, chosen, seed + turn):
                    self._add(parts, kinds, held_out, made, name.partition("-")[0], np.zeros(len(made), bool))
            if count >= max_samples:
                break
        for name, loader in (
            ("calibration_loader", calibration_loader),
            ("challenge_loader", challenge_loader),
        ):
            if loader is not None:
                self._add_loader(parts, kinds, held_out, name, loader, max_samples, verbose)
        if not count:
            raise ValueError("train_loader must hold at least one batch; it was empty")
        X = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels = np.array(kinds)
        self.detector.fit(X, (labels != "").astype(int), kinds=labels, held_out=np.array(held_out))
        self.detector_module = self.detector.to_module().to(self._device())
        if self.classifier is not None:
            self._fit_classifier(train_loader, verbose)
        return self

    def threshold(self, false_alarm_rate: float = 0.05) -> float:
        """The uncertainty that a share ``false_alarm_rate`` of clean inputs exceeds."""
        from fastgrad.estimators.detector import check_rate

        self._fitted()
        return -float(np.log(check_rate(false_alarm_rate)))

    @property
    def calibration_scores(self) -> Tensor:
        """Uncertainties ``(n,)`` of the clean inputs of the calibration."""
        return self._fitted().calibration_scores

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but the network to ``path``, a safetensors file with a digest (no pickle)."""
        from fastgrad.estimators import storage

        modules = {"detector": self._fitted()}
        if self.classifier_module is not None:
            modules["classifier"] = self.classifier_module  # type: ignore[assignment]
        extra = {
            "network": storage.fingerprint(self.model),
            "gradients": self.extraction.gradients,
            "log": self.extraction.log,
            "head": self.extraction.head,
            "classes": self.extraction.classes,
        }
        return storage.save(path, modules, extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> TwoStageModel:
        """The saved module around ``model``, the same bare network with the same weights.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is foreign, changed or damaged, or ``model`` is not the network it was saved
                with.
        """
        from fastgrad.estimators import UncertaintyDetector, storage

        modules, extra = storage.load(path)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; it was {type(model).__name__}")
        if storage.fingerprint(model) != extra["network"]:
            raise ValueError(
                f"model must be the network that {str(path)!r} was saved with; its parameters differ"
            )
        result = cls(model, detector=UncertaintyDetector(log=not extra["log"]), gradients=extra["gradients"])
        result.extraction.head, result.extraction.classes = extra["head"], extra["classes"]
        detector: Any = modules["detector"]
        classifier: Any = modules.get("classifier")
        result.detector_module = detector.eval().to(result._device())
        result.classifier_module = None if classifier is None else classifier.eval().to(result._device())
        return result

    def _fitted(self) -> DetectorModule:
        if self.detector_module is None:
            if not hasattr(self.detector, "module_"):
                raise RuntimeError("TwoStageModel must be fitted first: call fit(train_loader)")
            self.detector_module = self.detector.to_module().to(self._device())
        if self.classifier_module is None and hasattr(self.classifier, "network_"):
            assert self.classifier is not None  # it has a network_
            self.classifier_module = self.classifier.to_module().to(self._device())
        return self.detector_module

    def _introspect(self, features: Tensor, logits: Tensor) -> Tensor:
        assert self.classifier_module is not None  # the caller looked
        dtype = compute_dtype(logits.dtype)
        return self.classifier_module.from_features(features.to(dtype), logits.to(dtype)).softmax(-1)

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _add(
        self,
        parts: list[dict[str, Tensor]],
        kinds: list[str],
        held_out: list[bool],
        x: Inputs,
        kind: str,
        kept: np.ndarray[Any, Any],
    ) -> None:
        """Append the features of one batch."""
        logits, blocks = self.extraction(_to(x, self._device()))
        parts.append({name: value.float().cpu() for name, value in blocks.items()})
        kinds += [kind] * len(logits)
        held_out += kept.tolist()

    def _add_loader(
        self,
        parts: list[dict[str, Tensor]],
        kinds: list[str],
        held_out: list[bool],
        name: str,
        loader: Iterable[Any],
        limit: int,
        verbose: bool,
    ) -> None:
        clean, count = name == "calibration_loader", 0
        for batch in _bar(loader, name.partition("_")[0], verbose):
            x = _take(_first(name, batch), slice(0, limit - count))
            size = _length(x)
            self._add(parts, kinds, held_out, x, "" if clean else "challenge", np.full(size, clean))
            tags = batch[1] if not clean and isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            if tags is not None:
                named = tags.tolist() if isinstance(tags, Tensor) else list(tags)
                kinds[len(kinds) - size :] = [f"kind {tag}" for tag in named[:size]]
            count += size
            if count >= limit:
                break
        if clean and not count:
            raise ValueError(f"{name} must hold at least one batch; it was empty")

    def _challenges(
        self, x: Tensor, free: Tensor, chosen: list[str], seed: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Challenges from the images not held out; the whole batch says where black and white lie."""
        for name, made in iter_challenges(self.model, x.to(self._device()), names=chosen, seed=seed):
            yield name, made[free.to(made.device)]

    def _fit_classifier(self, loader: Iterable[Any], verbose: bool) -> None:
        assert self.classifier is not None  # the caller looked
        features, logits, labels = [], [], []
        for batch in _bar(loader, "introspection", verbose):
            x = _first("train_loader", batch)
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise ValueError(
                    "train_loader must give (x, labels) to fit the classifier; it gave no labels"
                )
            z, h = self.extraction.plain(_to(x, self._device()))
            if h is None:
                raise ValueError("the introspective classifier needs a model that ends in a linear layer")
            features.append(h.float().cpu())
            logits.append(z.float().cpu())
            labels.append(torch.as_tensor(batch[1]).cpu())
        targets = torch.cat(labels).numpy()
        classes = self.extraction.classes or 0
        if not np.array_equal(np.unique(targets), np.arange(classes)):
            raise ValueError(f"labels must take every value from 0 to {classes - 1}, the network's classes")
        self.classifier.fit({"features": torch.cat(features), "logits": torch.cat(logits)}, targets)
        self.classifier_module = self.classifier.to_module().to(self._device())


def _first(name: str, batch: Any) -> Inputs:
    """The inputs of a loader's batch: a tensor, a mapping, or the first of a tuple."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, (Tensor, Mapping)):
        raise TypeError(
            f"{name} must give tensors, mappings or tuples that begin with one; it gave {type(x).__name__}"
        )
    return x


def _inputs(name: str, loader: Iterable[Any]) -> Iterator[Inputs]:
    for batch in loader:
        yield _first(name, batch)


def _length(x: Inputs) -> int:
    return len(x) if isinstance(x, Tensor) else len(next(v for v in x.values() if isinstance(v, Tensor)))


def _take(x: Inputs, rows: slice) -> Inputs:
    if isinstance(x, Tensor):
        return x[rows]
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in x.items()}


def _to(x: Inputs, device: torch.device) -> Inputs:
    if isinstance(x, Tensor):
        return x.to(device)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in x.items()}


def _bar(items: Iterable[Any], name: str, verbose: bool) -> Iterable[Any]:
    if not verbose:
        return items
    from tqdm.auto import tqdm

    bar: Iterable[Any] = tqdm(items, desc=name, unit="batch")
    return bar
