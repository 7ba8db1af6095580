"""Network, blocks, introspective classifier and detector as one module."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.batches import bar, batch_size, first_input, to_device
from fastgrad.blocks import BLOCKS, Block, Features, Logits
from fastgrad.blocks.extraction import Extraction, Inputs, arguments
from fastgrad.blocks.subject import Subject, watch
from fastgrad.detector.budget import Candidates, Report, candidates
from fastgrad.detector.prediction import Prediction
from fastgrad.detector.samples import Sources, collect, expected
from fastgrad.losses import compute_dtype

if TYPE_CHECKING:
    from fastgrad.detector import UncertaintyDetector
    from fastgrad.detector.combined import DetectorModule
    from fastgrad.introspection import IntrospectiveClassifier
    from fastgrad.introspection.network import IntrospectiveNetwork
    from fastgrad.scores.temperature import Temperature

#: Fewer labelled samples give no temperature worth having.
_LABELLED = 30
#: Share of the labelled inputs that an introspective classifier is not trained on where no others calibrate it.
_UNSEEN = 0.2


class TwoStageModel(nn.Module):
    """A trained classifier that also says how far each of its predictions can be trusted.

    Torchvision, timm and Hugging Face classifiers work as they are. The network is only read: it runs in
    evaluation mode, and its mode, gradients and hooks stay what they were.

    What the detector reads of an input is made of blocks (`fastgrad.blocks`), each with a price in forward passes.
    `fit` measures price and worth of every block that the network and the budget allow and keeps the best set;
    `report` shows both.

    Args:
        model: The trained network; from a batch, or a mapping of keyword arguments, to logits ``(B, N)``,
            given as a tensor, as ``.logits`` or first in a tuple.
        detector: An `UncertaintyDetector`, fitted or not; None for the default one.
        classifier: An `IntrospectiveClassifier` to give the probabilities; None for the network's softmax.
        budget: What an answer may cost, in forward passes of this network on its device; the forward pass that
            gives the logits is the first. ``math.inf`` for whatever helps.
        blocks: Names or instances of the blocks to read, whatever they cost; None to choose within the budget.

    Raises:
        TypeError, ValueError: For an argument that is not one of the above; two blocks of one name; a budget
            below 1, the network's own forward pass.
    """

    #: It evaluates its network whatever modes its modules are in.
    evaluates = True

    def __init__(
        self,
        model: nn.Module,
        *,
        detector: UncertaintyDetector | None = None,
        classifier: IntrospectiveClassifier | None = None,
        budget: float = 1.2,
        blocks: Sequence[str | Block] | None = None,
    ) -> None:
        from fastgrad.detector import UncertaintyDetector
        from fastgrad.introspection import IntrospectiveClassifier

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
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 1:
            raise ValueError(
                "budget must be at least 1, the forward pass that gives the logits, in forward passes; "
                f"it was {budget!r}"
            )
        self.model = model
        self.detector = UncertaintyDetector(log=False) if detector is None else detector
        self.classifier = classifier
        self.budget = float(budget)
        self.asked = None if blocks is None else made(blocks)
        self.extraction: Extraction | None = None
        self.detector_module: DetectorModule | None = None
        self.classifier_module: IntrospectiveNetwork | None = None
        self.temperature: Temperature | None = None
        self._report: Report | None = None

    def forward(self, x: Inputs) -> Prediction:
        """Predict a batch.

        Args:
            x: What the network takes, ``(B, ...)``, or a mapping of its keyword arguments.

        Raises:
            RuntimeError: Before `fit`.
        """
        logits, blocks, detector = self._read(x)
        with torch.no_grad():
            return self._prediction(logits, blocks, detector(blocks))

    def explain(self, x: Inputs) -> tuple[Prediction, dict[str, Tensor]]:
        """Predict a batch, and say what makes it unusual.

        Args:
            x: As for a call.

        Returns:
            What a call gives, and the evidence ``(B,)`` of each block that has a score, by its name, and of the
            classifier of challenges, as ``"challenges"``; `alarms` has words for them. Evidence is -log p as the
            detector joins it: of each of the block's scores, above what counts at all, capped, weighted, summed; 0 is
            none, infinite where it cannot be computed. Its sum over all names is not the uncertainty, which is -log
            of the share of clean inputs that have so large a sum.

        Raises:
            RuntimeError: Before `fit`.
        """
        logits, blocks, detector = self._read(x)
        with torch.no_grad():
            score, evidence = detector.explain(blocks)
            prediction = self._prediction(logits, blocks, score)
        dtype = prediction.uncertainty.dtype
        return prediction, {name: own.to(dtype) for name, own in evidence.items()}

    @property
    def alarms(self) -> dict[str, str]:
        """What an alarm means that each part of the evidence raises, in plain words, by name."""
        from fastgrad.detector import supervised

        detector = self._fitted()
        assert self.extraction is not None  # a fitted model has one
        words = {block.name: block.alarm for block in self.extraction.blocks}
        words |= {supervised.NAME: supervised.alarm(detector.learned())}
        return {name: words.get(name) or name for name in detector.sources()}

    def _read(self, x: Inputs) -> tuple[Tensor, dict[str, Tensor], DetectorModule]:
        detector = self._fitted()
        assert self.extraction is not None  # a fitted model has one
        return *self.extraction(x), detector

    def _prediction(self, logits: Tensor, blocks: dict[str, Tensor], score: Tensor) -> Prediction:
        precise = logits.to(compute_dtype(logits.dtype))
        if self.classifier_module is not None:
            h = blocks["features"].to(precise.dtype)
            probabilities = self.classifier_module.from_features(h, precise).softmax(-1)
        elif self.temperature is not None:
            probabilities = self.temperature(precise).softmax(-1)
        else:
            probabilities = precise.softmax(-1)
        # A comparison with NaN is false, and would pass for reliable.
        score = torch.where(torch.isnan(score), torch.inf, score)
        return Prediction(logits, probabilities, score.to(precise.dtype))

    def fit(
        self,
        train_loader: Iterable[Any],
        challenge_loader: Iterable[Any] | None = None,
        *,
        calibration_loader: Iterable[Any] | None = None,
        max_samples: int = 5000,
        challenges_per_image: int | None = None,
        seed: int = 0,
        verbose: bool = False,
    ) -> TwoStageModel:
        """Choose the blocks, fit the detector on them, and calibrate the probabilities where there are labels.

        Args:
            train_loader: Batches of clean inputs, ``x`` or ``(x, labels)``. Clean data that the network was not
                trained on is better: it is more certain of its training data than of anything else. With integer
                labels, a temperature of the probabilities is fitted on what calibrates; an
                `IntrospectiveClassifier` needs them, and is not trained on a fifth of them, which calibrates it
                where ``calibration_loader`` has no labels.
            challenge_loader: Batches of challenging inputs, ``x`` or ``(x, kinds)``; None generates them from
                the clean images (`fastgrad.challenges`); ``()`` fits on clean data alone.
            calibration_loader: Clean batches that the network was not trained on, from which false-alarm
                rates are calibrated; None calibrates on ``train_loader``, each input by what was fitted
                without it and the challenges made from it.
            max_samples: Clean inputs that the detector is fitted on, at most; also challenging ones, times
                ``challenges_per_image``.
            challenges_per_image: How many generated challenges come from one clean image; None: two, or up to four
                where there are few images.
            seed: Of the held-out part and the challenges.
            verbose: Whether to show progress bars.

        Returns:
            The module itself.

        Raises:
            ValueError: A loader is empty or malformed, challenges cannot be made from the inputs, or a block
                that was asked for cannot be had.
        """
        if max_samples < 4:
            raise ValueError(f"max_samples must be at least 4; it was {max_samples}")
        if challenges_per_image is not None and challenges_per_image < 1:
            raise ValueError(
                f"challenges_per_image must be at least 1 or None; it was {challenges_per_image}"
            )
        batches = iter(train_loader)
        first = next(batches, None)
        if first is None:
            raise ValueError("train_loader must hold at least one batch; it was empty")
        x = to_device(first_input("train_loader", first), self._device())
        subject = watch(self.model, *arguments(x))
        chosen = self._candidates(subject, x)
        # Logits serve the order of classes and the temperature, whether or not the detector reads them.
        reading = any(isinstance(block, Logits) for block in chosen.blocks)
        extraction = self._extraction([*chosen.blocks, *([] if reading else [Logits()])], subject)
        samples = collect(
            extraction,
            self.model,
            self._device(),
            Sources(
                itertools.chain([first], batches),
                challenge_loader,
                calibration_loader,
                max_samples,
                expected(train_loader, batch_size(x)),
                challenges_per_image,
                seed,
                verbose,
            ),
        )
        X, kinds = samples.blocks(), np.array(samples.kinds)
        held_out, groups = np.array(samples.held_out), np.array(samples.groups)
        self._report = chosen.choose(self.detector, X, kinds, held_out, own=challenge_loader is not None)
        kept = self._report.kept
        apart = None if calibration_loader is None else held_out
        detector = self._report.fit(self.detector, X, kinds, groups, apart)
        inside = [block for block in chosen.blocks if block.name in kept]
        if self.classifier is not None and "features" not in kept:
            inside.append(Features())
        self.extraction = extraction.of(inside)
        self.detector = detector
        self.detector_module = self.detector.to_module().to(self._device())
        calibrating = (kinds == "") & (True if apart is None else apart)
        self.temperature = self._calibrate(samples.labels, calibrating, X["logits"])
        if self.classifier is not None:
            self._fit_classifier(train_loader, calibration_loader, seed, verbose)
        return self

    def report(self) -> Report:
        """What each block costs and is worth, and which are kept; it prints as a table.

        Raises:
            RuntimeError: Before `fit`.
        """
        if self._report is None:
            raise RuntimeError("a report needs a fit: call fit(train_loader)")
        return self._report

    def threshold(self, false_alarm_rate: float = 0.05) -> float:
        """The uncertainty that a share ``false_alarm_rate`` of clean inputs exceeds."""
        from fastgrad.detector.inputs import check_rate

        self._fitted()
        return -float(np.log(check_rate(false_alarm_rate)))

    @property
    def calibration_scores(self) -> Tensor:
        """Uncertainties ``(n,)`` of the clean inputs of the calibration."""
        return self._fitted().calibration_scores

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but the network to ``path``, a safetensors file with a digest (no pickle)."""
        from fastgrad.detector import storage

        modules: dict[str, Any] = {
            "detector": self._fitted(),
            "classifier": self.classifier_module,
            "temperature": self.temperature,
        }
        modules = {name: module for name, module in modules.items() if module is not None}
        extraction = self.extraction
        assert extraction is not None  # a fitted model has one
        extra = {
            "network": storage.fingerprint(self.model),
            "log": extraction.log,
            "budget": self.budget if math.isfinite(self.budget) else None,
            "blocks": [{"name": block.name, "options": block.options()} for block in extraction.blocks],
            "subject": None if extraction.known is None else extraction.known.to_json(),
            "report": None if self._report is None else self._report.to_json(),
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
        from fastgrad.detector import UncertaintyDetector, storage

        modules, extra = storage.load(path)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; it was {type(model).__name__}")
        if storage.fingerprint(model) != extra["network"]:
            raise ValueError(
                f"model must be the network that {str(path)!r} was saved with; its parameters differ"
            )
        detector: Any = modules["detector"]
        blocks = [BLOCKS[entry["name"]](**entry["options"]) for entry in extra["blocks"]]
        result = cls(
            model, detector=UncertaintyDetector(log=not extra["log"]), budget=extra.get("budget") or math.inf
        )
        known = extra.get("subject")
        result.extraction = result._extraction(blocks, None if known is None else Subject.from_json(known))
        report = extra.get("report")
        result._report = None if report is None else Report.from_json(report)
        result.detector_module = detector.eval().to(result._device())
        for name in ("classifier", "temperature"):
            if name in modules:
                kept = modules[name].eval().to(result._device())
                setattr(result, "classifier_module" if name == "classifier" else name, kept)
        return result

    def _fitted(self) -> DetectorModule:
        if self.detector_module is None:
            if not hasattr(self.detector, "module_"):
                raise RuntimeError("TwoStageModel must be fitted first: call fit(train_loader)")
            self.detector_module = self.detector.to_module().to(self._device())
        if self.extraction is None:
            # A detector that was fitted elsewhere says which blocks it reads.
            self.extraction = self._extraction([BLOCKS[name]() for name in self.detector.shapes_], None)
        if self.classifier_module is None and hasattr(self.classifier, "network_"):
            assert self.classifier is not None  # it has a network_
            self.classifier_module = self.classifier.to_module().to(self._device())
        return self.detector_module

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _extraction(self, blocks: Sequence[Block], subject: Subject | None) -> Extraction:
        extraction = Extraction(self.model, blocks, log=not self.detector.log)
        extraction.known = subject
        return extraction

    def _candidates(self, subject: Subject, x: Inputs) -> Candidates:
        """The blocks that were asked for, or all that the network, the input and the budget allow."""
        return candidates(self.model, subject, x, self.budget, self.asked)

    def _calibrate(
        self, given: Sequence[int], clean: NDArray[np.bool_], logits: Tensor
    ) -> Temperature | None:
        """A temperature from ``clean`` samples, where they have labels of the network's classes."""
        from fastgrad.scores.temperature import Temperature

        labels = torch.tensor(given)
        usable = torch.from_numpy(clean) & (labels >= 0) & (labels < logits.shape[1])
        if int(usable.sum()) < _LABELLED:
            return None
        return Temperature.fit(logits[usable], labels[usable]).to(self._device())

    def _fit_classifier(
        self, train: Iterable[Any], calibration: Iterable[Any] | None, seed: int, verbose: bool
    ) -> None:
        """Train the classifier, and calibrate its probabilities on labelled inputs that it was not trained on."""
        assert self.classifier is not None  # the caller looked
        R, labels = self._introspective("train_loader", train, verbose)
        classes = R["logits"].shape[1]
        if not np.array_equal(np.unique(labels), np.arange(classes)):
            raise ValueError(f"labels must take every value from 0 to {classes - 1}, the network's classes")
        fresh: dict[str, Tensor] = {}
        truth = labels[:0]
        if calibration is not None and not isinstance(calibration, Iterator):
            fresh, truth = self._introspective("calibration_loader", calibration, verbose)
        known = (truth >= 0) & (truth < classes)
        if known.sum() >= _LABELLED:
            self.classifier.fit(R, labels).calibrate(_rows(fresh, known), truth[known])
        else:
            kept = np.random.default_rng(seed).random(len(labels)) < _UNSEEN
            rest = labels[~kept]
            if kept.sum() >= _LABELLED and len(np.unique(rest)) == classes:
                self.classifier.fit(_rows(R, ~kept), rest).calibrate(_rows(R, kept), labels[kept])
            else:
                self.classifier.fit(R, labels)
        self.classifier_module = self.classifier.to_module().to(self._device())

    def _introspective(
        self, name: str, loader: Iterable[Any], verbose: bool
    ) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
        """What the classifier reads of every batch, and the labels; of a calibration loader only where it has them."""
        assert self.extraction is not None  # fitted before
        features, logits, labels = [], [], []
        for batch in bar(loader, "introspection", verbose):
            x = first_input(name, batch)
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                if name != "train_loader":
                    continue
                raise ValueError(f"{name} must give (x, labels) to fit the classifier; it gave no labels")
            z, h = self.extraction.plain(to_device(x, self._device()))
            if h is None:
                raise ValueError("the introspective classifier needs a model that ends in a linear layer")
            features.append(h.float().cpu())
            logits.append(z.float().cpu())
            labels.append(torch.as_tensor(batch[1]).cpu())
        if not labels:
            return {}, np.zeros(0, np.int64)
        return {"features": torch.cat(features), "logits": torch.cat(logits)}, torch.cat(labels).numpy()


def _rows(values: dict[str, Tensor], chosen: NDArray[np.bool_]) -> dict[str, Tensor]:
    places = torch.as_tensor(np.flatnonzero(chosen))
    return {name: value[places] for name, value in values.items()}


def made(blocks: Sequence[str | Block]) -> list[Block]:
    """Blocks from names and instances.

    Raises:
        TypeError: One is neither.
        ValueError: There is none, one has an unknown name, or two have the same.
    """
    if isinstance(blocks, (str, Block)):
        raise TypeError(f"blocks must be a sequence of names or blocks; it was {blocks!r}")
    result: list[Block] = []
    for block in blocks:
        if isinstance(block, str):
            if block not in BLOCKS:
                raise ValueError(f"blocks must be among {', '.join(map(repr, BLOCKS))}; one was {block!r}")
            block = BLOCKS[block]()
        if not isinstance(block, Block):
            raise TypeError(f"blocks must be names or blocks; one was {block!r}")
        if any(block.name == other.name for other in result):
            raise ValueError(f"blocks must differ; {block.name!r} was there twice")
        result.append(block)
    if not result:
        raise ValueError("blocks must name at least one block; it was empty")
    return result
