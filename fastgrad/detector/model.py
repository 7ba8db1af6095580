"""Network, blocks, detector, correction and risk as one module."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import original
from fastgrad.batches import batch_size
from fastgrad.blocks import BLOCKS, Block, Penultimate
from fastgrad.blocks.block import CHALLENGE_CLASSIFIER
from fastgrad.blocks.extraction import Extraction, Inputs
from fastgrad.blocks.features import Features
from fastgrad.blocks.subject import Subject
from fastgrad.detector import UncertaintyDetector, constants, data, fitting, loaders, price, storage
from fastgrad.detector.calibrate import DetectorModule
from fastgrad.detector.report import Report
from fastgrad.detector.risk import NoisyOr, Risk, doubt, tempered
from fastgrad.evaluation import buffers_kept, device_of, refuse_scripted
from fastgrad.introspection.correction import Correction, mixed
from fastgrad.prediction import Prediction
from fastgrad.scores.temperature import Temperature

#: The modules that a fit makes, of which some may be None.
MODULES = ("detector", "correction", "gate", "temperature", "risk")


class Explanation(NamedTuple):
    """A prediction and the evidence behind it.

    Attributes:
        prediction: The result of a call.
        evidence: ``(B,)`` by name of block: the capped, weighted sum of -log p of its scores. ``"challenges"`` is the
            challenge classifier. 0 means none; infinite if it cannot be computed. The uncertainty is -log of the share
            of clean inputs with at least this sum of all evidence.
        raised: ``(B,)`` by the same names: by how much this evidence raises the risk; for ``"challenges"``, by how much
            the resemblance to a challenge does. None without risk. If two pieces of evidence cannot be computed, both
            are 0 here: without either one alone, the risk would still be 1.
    """

    prediction: Prediction
    evidence: dict[str, Tensor]
    raised: dict[str, Tensor] | None


class TwoStageModel(nn.Module):
    """A trained classifier that also says how unusual each input is, and how likely each answer is wrong.

    Torchvision, timm and Hugging Face classifiers work as they are. The network is only read: it runs in evaluation
    mode, and its mode, gradients and hooks stay as they were. `fit` does not change its buffers, either. A network with
    a module in training mode is copied at every call; call ``eval()`` first to save that time.

    Args:
        model: The trained network, from a batch or a mapping of keyword arguments to logits ``(B, N)``: a tensor,
            ``.logits``, or the first item of a tuple.
        detector: An `UncertaintyDetector` whose parameters are used; it is not changed. One that is already fitted on
            named blocks needs no `fit`. None for the default one.
        blocks: Names or instances of the blocks; None for those of `fastgrad.blocks.DEFAULT_BLOCKS` that the network
            can serve. `price` measures what they cost.
        seed: Seed of all random numbers; a given detector keeps its own ``random_state``.

    Attributes:
        detector_: The fitted `DetectorModule`.
        correction_: The correction of the answers to unusual inputs, or None.
        gate_: The probability that an input is a challenge, from its evidence; None without a correction.
        temperature_: The temperature of the softmax, fitted on labels, or None.
        risk_: The probability that the answer is wrong, from its own probability and the evidence, or None.
        report_: The `Report` of the last fit, or None.
        extraction_: The `Extraction` that reads the blocks.

    Raises:
        TypeError, ValueError: An argument is not as described, or two blocks have the same name.
    """

    #: The network runs in evaluation mode, whatever the modes of its modules are.
    evaluates = True

    def __init__(
        self,
        model: nn.Module,
        *,
        detector: UncertaintyDetector | None = None,
        blocks: Sequence[str | Block] | None = None,
        seed: int = 0,
        **unknown: object,
    ) -> None:
        super().__init__()
        if "budget" in unknown:
            raise TypeError(
                "budget must not be given: name the blocks instead, blocks=[...], and measure their cost after the fit "
                f"with price(x); it was {unknown['budget']!r}"
            )
        if unknown:
            raise TypeError(f"TwoStageModel takes model, detector, blocks and seed; it was given {sorted(unknown)}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; it was {type(model).__name__}")
        refuse_scripted(model)
        if detector is not None and not isinstance(detector, UncertaintyDetector):
            raise TypeError(f"detector must be an UncertaintyDetector or None; it was {type(detector).__name__}")
        checks.is_seed(seed)
        self.model, self.detector = model, detector
        self.seed = int(seed)
        self.blocks = None if blocks is None else tuple(named_blocks(blocks))
        self.extraction_: Extraction | None = None
        self.detector_: DetectorModule | None = None
        self.correction_: Correction | None = None
        self.gate_: NoisyOr | None = None
        self.temperature_: Temperature | None = None
        self.risk_: Risk | None = None
        self.report_: Report | None = None
        # A fitted argument is copied, so that this module and the user's do not share state.
        if detector is not None and hasattr(detector, "module_"):
            by_name: dict[str, Block] = {block.name: block for block in self.blocks or ()}
            own = [by_name.get(key) or BLOCKS[key]() for key in detector.shapes_]
            self.extraction_ = Extraction(model, own, log=not detector.log)
            self.detector_ = copy.deepcopy(detector.module_).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return device_of(self.model)

    @property
    def false_alarm_rate(self) -> float:
        """Share of clean inputs that `Prediction.flagged` may call unusual; can be set, and is stored."""
        return float(self._fitted()[0].options["false_alarm_rate"])

    @false_alarm_rate.setter
    def false_alarm_rate(self, rate: float) -> None:
        checks.lies_in("(0, 1)", false_alarm_rate=rate)
        self._fitted()[0].options["false_alarm_rate"] = float(rate)

    def forward(self, x: Inputs) -> Prediction:
        """Predict a batch ``(B, ...)`` of what the network takes, or a mapping of its keyword arguments.

        Returns:
            The `Prediction`: logits and probabilities ``(B, N)``, uncertainty, risk and flagged ``(B,)``.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: The network fails on inputs of another number of dimensions or dtype than those of `fit`.
        """
        return self._predict(x)[0]

    def explain(self, x: Inputs) -> Explanation:
        """Predict a batch, and say what makes it unusual and what raises the risk.

        Argument and errors are those of a call. The `Explanation` has evidence ``(B,)`` by name of block.
        """
        prediction, doubts, evidence, kinds = self._predict(x)
        names, dtype = self._fitted()[0].evidence_names, prediction.uncertainty.dtype

        def named(columns: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, columns.to(dtype).unbind(-1), strict=True))

        with torch.no_grad():
            raised = None if self.risk_ is None else named(self.risk_.raised(doubts, evidence, kinds))
        return Explanation(prediction, named(evidence), raised)

    def _predict(self, x: Inputs) -> tuple[Prediction, Tensor, Tensor, Tensor]:
        """Return prediction, 1 - its largest probability ``(B,)``, evidence ``(B, S)``, log p of kinds ``(B, C)``."""
        return self._answer(*self._fitted()[1](x))

    def _answer(self, logits: Tensor, blocks: dict[str, Tensor]) -> tuple[Prediction, Tensor, Tensor, Tensor]:
        detector, _ = self._fitted()
        with torch.no_grad():
            uncertainty, evidence, kinds = detector.explain(blocks)
            calibrated = tempered(logits, self.temperature_)
            log_p = calibrated.log_softmax(-1)
            if self.correction_ is not None and self.gate_ is not None:
                log_p = mixed(
                    log_p, self.correction_(blocks[Penultimate.name], calibrated), self.gate_.log_odds(evidence)
                )
            doubts = doubt(log_p)
            risk = None if self.risk_ is None else self.risk_(doubts, evidence, kinds).to(log_p.dtype)
            flagged = uncertainty > -math.log(self.false_alarm_rate)
            prediction = Prediction(logits, log_p.exp(), uncertainty.to(log_p.dtype), risk, flagged)
        return prediction, doubts, evidence, kinds

    @property
    def alarms(self) -> dict[str, str]:
        """The meaning of each alarm in words, by the names of the evidence."""
        detector, extraction = self._fitted()
        words = {block.name: block.alarm for block in extraction.blocks}
        seen = ", ".join(detector.classifier_blocks()).replace("_", " ")
        resemblance = "resemblance to altered or foreign inputs that the detector was trained on"
        words[CHALLENGE_CLASSIFIER] = f"{resemblance} (seen in {seen})"
        return {name: words.get(name) or name for name in detector.evidence_names}

    @torch.inference_mode(False)
    def fit(
        self,
        clean: loaders.Given,
        y: Any = None,
        *,
        challenges: str | loaders.Given | None = "generate",
        calibration: loaders.Given | None = None,
        max_samples: int = constants.MOST_CLEAN,
        challenges_per_input: int | None = None,
        risk: bool | None = None,
        correct: bool | Literal["always"] = False,
        clip: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        verbose: bool | None = None,
    ) -> TwoStageModel:
        """Fit the detector on clean inputs and challenges; with labels also the probabilities and the risk.

        Args:
            clean: Clean inputs: a tensor or array ``(n, ...)``, a mapping of tensors, or a loader of batches, ``x`` or
                ``(x, labels)``, or mappings with the key ``"labels"``; read once. Floating arrays get the network's
                dtype. Prefer data that the network was not trained on: it is more certain of its training data. Equal
                inputs are one source: each fit uses all of them or none. Half of the images are shifted by up to one
                grey level (`fastgrad.detector.grey_levels`).
            y: Labels ``(n,)`` of inputs that are no loader; None for none.
            challenges: ``"generate"`` makes them from the clean inputs (`fastgrad.challenges`): images
                ``(B, C, H, W)``, or token ids ``(B, T)`` of an integer dtype, alone or as ``input_ids``. Images get no
                attacks if no gradient of the logits reaches them (``torch.no_grad`` or integers inside). None fits on
                clean data alone. Otherwise, give your own challenging inputs, or batches of them with kinds. Only
                generated challenges, which have labels, let unusual inputs raise the risk.
            calibration: Clean inputs on which nothing is fitted: false-alarm rates are then exact. None holds out a
                fifth of ``clean`` from 1,000 inputs on; below, it cross-validates (`fastgrad.detector.calibrate`).
            max_samples: Largest number of inputs used from each loader, drawn uniformly.
            challenges_per_input: How many challenges are generated from one clean input. None means three, or fewer if
                there are many inputs.
            risk: True refuses data without labels, False fits no risk, None fits it if at least 30 labels allow it.
            correct: Whether to learn a correction of the answers to unusual inputs from labels and generated challenges
                (`fastgrad.introspection.correction`). It is kept only if it answers better in cross-validation, beyond
                the 95 % interval; otherwise a warning gives both accuracies. ``"always"`` keeps it anyway. The report
                shows both accuracies.
            clip: Values of black and white of the images, before ``mean`` and ``std``. None means 0 and 1 with
                ``mean``, or else the range of the images drawn from ``clean``.
            mean: Per-channel mean that normalised the images.
            std: Per-channel standard deviation that normalised the images.
            verbose: Whether to show progress bars; None: in a terminal.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: A loader is empty, malformed or too small. Labels are missing or are not classes.
                Images are outside the given range. Challenges cannot be made from the inputs, or from images that span
                almost none of the range. A named block is impossible. The network returns probabilities instead of
                logits. The network or a block mixes samples of a batch.
                All of it is checked before the first challenge is read.
        """
        with buffers_kept(self.model):
            parts = fitting.fit(
                self.model, self.detector, self.blocks, self.seed, clean=clean, y=y, challenges=challenges,
                calibration=calibration, max_samples=max_samples, challenges_per_input=challenges_per_input, clip=clip,
                mean=mean, std=std, verbose=verbose, **_labelled(risk, correct),
            )  # fmt: skip
        return self._take(parts)

    @torch.inference_mode(False)
    def fit_features(
        self, features: Features, *, risk: bool | None = None, correct: bool | Literal["always"] = False
    ) -> TwoStageModel:
        """Fit on features that were read before, by `read_features` or from a cache; the network does not run.

        Args:
            features: `Features` of clean inputs and of challenges, if any, with the blocks that this model names, or
                with any if it names none.
            risk: As for `fit`.
            correct: As for `fit`; the features need the block ``"features"``.

        Raises:
            TypeError, ValueError: Blocks are missing or malformed, or there are too few inputs or labels.
        """
        checks.is_a(Features, features=features)
        blocks = [BLOCKS[name]() for name in features.blocks] if self.blocks is None else self.blocks
        how = _labelled(risk, correct)
        data.require_labels(features.labels, **how, generate=bool(features.challenging.any()))
        return self._take(fitting.fit_features(self.model, self.detector, blocks, features, self.seed, **how))

    @torch.inference_mode(False)
    def read_features(self, clean: loaders.Given, y: Any = None, **given: Any) -> Features:
        """Return the `Features` that `fit` would be fitted on, with its arguments and errors but for labels' uses."""
        with buffers_kept(self.model):
            return fitting.read(self.model, self.detector, self.blocks, self.seed, clean=clean, y=y, **given)

    def predict_features(self, features: Features) -> Prediction:
        """Return the `Prediction` for features that were read before; the network does not run.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: A block is missing.
        """
        checks.is_a(Features, features=features)
        _, extraction = self._fitted()
        own = features.only(block.name for block in extraction.blocks)
        moved = {name: value.to(self.device) for name, value in own.blocks.items()}
        return self._answer(own.logits.to(self.device), moved)[0]

    def _take(self, parts: fitting.Parts) -> TwoStageModel:
        for name, part in parts._asdict().items():
            setattr(self, f"{name}_", part)
        if (parts.report.correction or "").startswith("not kept"):
            warnings.warn(
                "correct=True: no correction certainly answers better, so the network answers alone: "
                f"{parts.report.correction}",
                stacklevel=4,  # whoever calls `fit`
            )
        return self

    def report(self) -> Report:
        """Return the summary of the last fit; it prints as text.

        Raises:
            RuntimeError: Before `fit`.
        """
        if self.report_ is None:
            raise RuntimeError("a report needs a fit: call fit(clean)")
        return self.report_

    def price(self, x: Inputs, *, rounds: int = price.ROUNDS) -> price.Price:
        """Measure what an answer to the batch ``x`` costs, in forward passes of the plain network; return the `Price`.

        Answer and network take turns, so many ``rounds``, on the network's device. The model stays as it is.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: ``rounds`` is below 3, or ``x`` holds no input.
        """
        checks.at_least(3, rounds=rounds)
        self._fitted()
        if not batch_size(x):
            raise ValueError("x must hold at least one input; it held none")
        return price.measure(self.model, self, x, rounds)

    def threshold(self, false_alarm_rate: float | None = None) -> float:
        """Return the uncertainty that a share ``false_alarm_rate`` of clean inputs exceeds; default: the detector's.

        Warn of a rate below ``1 / (n + 1)``, which n calibration inputs cannot promise.
        """
        return self._fitted()[0].threshold(false_alarm_rate)

    @property
    def calibration_scores(self) -> Tensor:
        """Uncertainties ``(n,)`` of the clean inputs that calibrate, each from a fit without it."""
        return self._fitted()[0].calibration_scores

    @property
    def wrong_above(self) -> float | None:
        """The risk above which as many answers to clean inputs are as were wrong, for `fastgrad.deploy.error_rate`.

        None if the risk was fitted without challenges, or there is none.
        """
        self._fitted()
        return None if self.risk_ is None else self.risk_.options["wrong_above"]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but the network to ``path``, a safetensors file with a digest (no pickle).

        Raises:
            ValueError: A block's class is not registered (`fastgrad.blocks.register_block`).
        """
        _, extraction = self._fitted()
        for block in extraction.blocks:
            if BLOCKS.get(block.name) is not type(block):
                raise ValueError(
                    f"blocks must be registered to be stored: use fastgrad.blocks.register_block; {block.name!r} is not"
                )
        extra = {
            "network": storage.fingerprint(self.model),
            "log": extraction.log,
            "seed": self.seed,
            "blocks": [{"name": block.name, "options": block.options()} for block in extraction.blocks],
            "subject": None if extraction.subject is None else asdict(extraction.subject),
            "report": None if self.report_ is None else asdict(self.report_),
        }
        modules = {name: module for name in MODULES if (module := getattr(self, f"{name}_")) is not None}
        return storage.save(path, modules, extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> TwoStageModel:
        """Return the saved two-stage model; ``model`` is the network it was saved with, with the same weights.

        If it is fitted again, it uses the default detector and blocks, whatever the saved model was given.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: ``model`` is not a module.
            ValueError: The file is foreign, changed or damaged, ``model`` is not the network it was saved with, or a
                block's class is not registered.
        """
        checks.is_path(path=path)
        result = cls(model)
        modules, extra = storage.load(path)
        foreign = f"path must be a file written by TwoStageModel.save; {str(path)!r} is not one"
        try:
            fingerprint, result.seed, log = extra["network"], int(extra["seed"]), bool(extra["log"])
            entries = {str(entry["name"]): dict(entry["options"]) for entry in extra["blocks"]}
            subject = None if extra["subject"] is None else Subject.from_json(extra["subject"])
            result.report_ = None if extra["report"] is None else Report.from_json(extra["report"])
            str(result.report_)
            parts = [modules.pop(name, None) for name in MODULES]
        except storage.ALTERED as error:
            raise ValueError(foreign) from error
        kinds = (DetectorModule, Correction, NoisyOr, Temperature, Risk)
        wrong = [part for part, kind in zip(parts, kinds, strict=True) if not isinstance(part, (kind, type(None)))]
        if wrong or modules or parts[0] is None:
            raise ValueError(foreign)
        if storage.fingerprint(model) != fingerprint:
            raise ValueError(f"model must be the network that {str(path)!r} was saved with; its parameters differ")
        if unknown := [name for name in entries if name not in BLOCKS]:
            raise ValueError(f"blocks of {str(path)!r} must be registered (register_block); unknown: {unknown}")
        try:
            blocks = [BLOCKS[name](**options) for name, options in entries.items()]
        except TypeError as error:
            raise ValueError(foreign) from error
        result.extraction_ = Extraction(model, blocks, log=log, subject=subject)
        for name, part in zip(MODULES, parts, strict=True):
            setattr(result, f"{name}_", None if part is None else part.eval().to(result.device))
        return result

    def _fitted(self) -> tuple[DetectorModule, Extraction]:
        if self.detector_ is None:
            raise RuntimeError("TwoStageModel must be fitted first: call fit(clean)")
        if self.extraction_ is None or self.extraction_.model is not original(self.model):
            raise RuntimeError("model must be the network that TwoStageModel was fitted with: call fit(clean) again")
        return self.detector_, self.extraction_


def _labelled(risk: bool | None, correct: object) -> dict[str, Any]:
    """Return the arguments of a fit that need labels, checked."""
    if risk is not None:
        checks.is_bool(risk=risk)
    if not isinstance(correct, bool) and correct != "always":
        raise TypeError(f"correct must be True, False or 'always'; it was {correct!r}")
    return {"risk": risk, "correct": correct}


def named_blocks(blocks: Sequence[str | Block]) -> list[Block]:
    """Return blocks from names and instances, checked."""
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
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
