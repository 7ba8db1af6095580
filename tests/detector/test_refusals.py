"""What the detector and the two-stage model refuse, with an error that names the argument."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from bad_arguments import Refused, refused
from sklearn.exceptions import NotFittedError
from small_nets import Net
from torch import nn

from fastgrad import TwoStageModel as Two
from fastgrad import UncertaintyDetector
from fastgrad.blocks import Logits

ROWS = np.random.default_rng(0).random((60, 6))
BLOCKS = {"logits": ROWS, "image": ROWS}
IMAGES = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WITHOUT = IMAGES * torch.nan
ALONE: dict[str, Any] = {"challenges": None}
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()


def fitted(X: Any = ROWS) -> UncertaintyDetector:
    return UncertaintyDetector(folds=2).fit(X)


class Weighed(Logits):
    """A block of the user's with the scores of another."""

    name = "weighed"


class Ranked(Logits):
    """A block of the user's that compares inputs of a batch."""

    name = "ranked"

    def values(self, forward: Any) -> torch.Tensor:
        return super().values(forward).argsort(0).float()


class Summed(Logits):
    """A block of the user's with one number for all inputs."""

    name = "summed"

    def values(self, forward: Any) -> torch.Tensor:
        return super().values(forward).sum()


class Silent(Logits):
    """A block of the user's without a score."""

    name = "silent"
    scores = ()


def centred(net: Any, x: torch.Tensor) -> Any:
    """Scales inputs by what is usual in their batch."""
    return net.net((x - x.mean()) / x.std())


def scripted() -> nn.Module:
    traced: nn.Module = torch.jit.trace(NET, IMAGES)
    return traced


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(NET)


def answered(x: torch.Tensor) -> Any:
    return Two(NET, blocks=["logits", "image"]).fit(IMAGES, **ALONE)(x)


HEADLESS = r"the network can serve, .*'logits'.*; 'features': .*linear layer"
ONE = nn.Sequential(NET, nn.Linear(4, 1))
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
HEAD = nn.Sequential(NET, nn.Softplus()).eval()
LABELS = torch.arange(60) % 4
BYTES = (255 * IMAGES).to(torch.uint8)
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
SOFTMAX = "model must return logits; it returned probabilities"
BAD: dict[str, Refused] = {
    "folds": (lambda: UncertaintyDetector(folds=1).fit(ROWS), ValueError, "folds .* it was 1"),
    "half a fold": (lambda: UncertaintyDetector(folds=2.5).fit(ROWS), ValueError, "folds must"),  # type: ignore[arg-type]
    "fraction": (lambda: UncertaintyDetector(calibration_fraction=1.0).fit(ROWS), ValueError, "_fraction must"),
    "half": (lambda: UncertaintyDetector(calibration_fraction="half").fit(ROWS), TypeError, "_fraction must"),
    "a list": (lambda: UncertaintyDetector(calibration_fraction=[0.5]).fit(ROWS), TypeError, "_fraction must"),
    "alarms": (lambda: UncertaintyDetector(false_alarm_rate=0.0).fit(ROWS), ValueError, "false_alarm_rate must"),
    "kinds": (lambda: fitted().fit(ROWS, np.tile([0, 1], 30), kinds=[1]), ValueError, "kinds must"),
    "two sources": (lambda: fitted().fit(ROWS[:4], sources=[0, 0, 0, 1]), ValueError, "sources must leave 2 clean"),
    "few sources": (lambda: fitted().fit(ROWS, sources=np.zeros(9, int)), ValueError, "sources must be integers"),
    "no integers": (lambda: fitted().fit(ROWS, sources=np.zeros(60)), ValueError, "sources must be integers"),
    "a source": (lambda: fitted().fit(ROWS, sources=np.zeros(60, int)), ValueError, "sources must .* at least 2"),
    "held out": (lambda: fitted().fit(ROWS, held_out=np.zeros(60, dtype=bool)), ValueError, "held_out must"),
    "numbers": (lambda: fitted().fit(ROWS, held_out=np.zeros(60)), ValueError, "held_out must be bool of shape"),
    "other count": (lambda: fitted().fit(ROWS, held_out=np.ones(5, dtype=bool)), ValueError, r"held_out .* \(60,\)"),
    "held all": (lambda: fitted().fit(ROWS, held_out=np.arange(60) > 1), ValueError, "held_out must .* and left 2"),
    "threshold": (lambda: fitted().threshold(1.0), ValueError, "false_alarm_rate must lie in"),
    "norms": (lambda: UncertaintyDetector().fit({"gradients": -ROWS}), ValueError, r"X\['gradients'\] must hold"),
    "no rows": (lambda: UncertaintyDetector().fit(np.ones((0, 2, 3))), ValueError, "X must not be empty"),
    "labels": (lambda: UncertaintyDetector().fit(ROWS, np.full(60, np.nan)), ValueError, "y must be finite"),
    "not fitted": (lambda: UncertaintyDetector().decision_function(ROWS), NotFittedError, "not fitted yet"),
    "other blocks": (lambda: fitted().decision_function({"logits": ROWS}), ValueError, "blocks and shapes of fit"),
    "one block": (lambda: fitted(BLOCKS).decision_function({"logits": ROWS}), ValueError, "blocks and shapes of fit"),
    "one label": (lambda: fitted().score(ROWS, np.zeros(60)), ValueError, r"\[0, 1\]; it held \[0\.\]. Both must be"),
    "label count": (lambda: fitted().score(ROWS, [0, 1]), ValueError, "y must have one label per row"),
    "model": (lambda: Two("resnet18"), TypeError, r"model must be a torch\.nn\.Module"),  # type: ignore[arg-type]
    "detector": (lambda: Two(NET, detector=NET), TypeError, "detector must be"),  # type: ignore[arg-type]
    "another network's": (lambda: Two(NET, detector=fitted())(IMAGES), ValueError, "'gradients' must have"),
    "seed": (lambda: Two(NET, seed=-1), ValueError, "seed must be an integer"),
    "no fit": (lambda: Two(NET)(IMAGES), RuntimeError, "must be fitted first"),
    "nothing to explain": (lambda: Two(NET).explain(IMAGES), RuntimeError, "must be fitted first"),
    "no report": (lambda: Two(NET).report(), RuntimeError, "a report needs a fit"),
    "unknown": (lambda: Two(NET, blocks=["colours"]), ValueError, "among .*'image'.*; one was 'colours'"),
    "twice": (lambda: Two(NET, blocks=["logits", Logits()]), ValueError, "differ; 'logits' was there twice"),
    "no block": (lambda: Two(NET, blocks=[]), ValueError, "blocks must name at least one block"),
    "one name": (lambda: Two(NET, blocks="logits"), TypeError, "blocks must be a sequence"),
    "no blocks": (lambda: Two(NET, blocks=5), TypeError, "blocks must be a sequence .* it was 5"),  # type: ignore[arg-type]
    "a number": (lambda: Two(NET, blocks=[3]), TypeError, "blocks must be names or blocks; one was 3"),  # type: ignore[list-item]
    "one score": (lambda: Two(NET, blocks=["logits", Weighed()]).fit([IMAGES], **ALONE), ValueError, "'energy'"),
    "headless": (lambda: Two(NET[:4], blocks=["features"]).fit([IMAGES], **ALONE), ValueError, HEADLESS),
    "budget": (lambda: Two(NET, budget=1.2), TypeError, r"budget .* blocks=.*price\(x\); it was 1\.2"),
    "a word": (lambda: Two(NET, block=["logits"]), TypeError, r"it was given \['block'\]"),
    "rounds": (lambda: Two(NET).price(IMAGES, rounds=1), ValueError, "rounds must be .* at least 3"),
    "no price": (lambda: Two(NET).price(IMAGES), RuntimeError, "must be fitted first"),
    "nothing priced": (
        lambda: Two(NET, blocks=["logits"]).fit([IMAGES], **ALONE).price(IMAGES[:0]), ValueError, "one input",
    ),
    "one layer": (lambda: Two(LINEAR, blocks=["activations"]).fit([IMAGES], **ALONE), ValueError, "but the l"),
    "softmax": (lambda: Two(nn.Sequential(NET, nn.Softmax(1))).fit([IMAGES], **ALONE), ValueError, SOFTMAX),
    "one output": (lambda: Two(ONE).fit([(IMAGES, torch.ones(60))], **ALONE), ValueError, "with one output"),
    "last": (lambda: Two(FLAT).fit([IMAGES.movedim(1, -1)]), ValueError, r"last, \(60, 8, 8, 3\). Move"),
    "mixing": (lambda: Two(Net(centred, net=NET)).fit([IMAGES]), ValueError, "its logits of a s"),
    "ranked": (lambda: Two(NET, blocks=[Logits(), Ranked()]).fit([IMAGES]), ValueError, "'ranked' has other"),
    "summed": (lambda: Two(NET, blocks=[Summed()]).fit([*IMAGES.split(1)]), ValueError, "'summed' has one"),
    "pixels": (lambda: Two(FLAT, blocks=["image"]).fit([IMAGES.view(60, 48, 2, 2)]), ValueError, "3 x 3"),
    "no loader": (lambda: Two(NET).fit(5), TypeError, "clean must be a loader of batches; it was int"),  # type: ignore[arg-type]
    "labels beside a loader": (lambda: Two(NET).fit([IMAGES], LABELS), TypeError, "y must be None .* Tensor"),
    "challenges in their place": (lambda: Two(NET).fit([IMAGES], [IMAGES]), TypeError, "challenges=.*; it w"),
    "too few labels": (lambda: Two(NET).fit(IMAGES, LABELS[:5]), ValueError, r"y .* 60 inputs; .* \(5,\)"),
    "words": (lambda: Two(NET).fit(np.array(["a"] * 60)), TypeError, "clean must be an array of numbers"),
    "bytes": (lambda: Two(NET).fit(BYTES), ValueError, r"floating dtype.* x.float\(\) / 255; .* torch.uint8"),
    "one image": (lambda: Two(NET).fit([IMAGES[0]] * 60), ValueError, r"left inputs of shape \(8, 8\): a b.*x\[None\]"),
    "bytes later": (lambda: answered(BYTES[:2]), ValueError, "x must be a batch like .* torch.float32; .*uint8"),
    "one later": (lambda: answered(IMAGES[0]), ValueError, r"4 dimensions .* \(3, 8, 8\) .*: .* x\[None\]"),
    "double": (lambda: answered(IMAGES.double()), ValueError, "4 dimensions and torch.float32; .* torch.float64"),
    "few": (lambda: Two(NET).fit([IMAGES[:3]], **ALONE), ValueError, "at least"),
    "risk": (lambda: Two(NET).fit([IMAGES], **ALONE, risk="yes"), TypeError, "risk must be .* 'yes'"),  # type: ignore[arg-type]
    "correct": (lambda: Two(NET).fit([IMAGES], **ALONE, correct="yes"), TypeError, "'always'; it was 'yes'"),  # type: ignore[arg-type]
    "verbose": (lambda: Two(NET).fit([IMAGES], **ALONE, verbose=2), TypeError, "verbose must be .* 2"),  # type: ignore[arg-type]
    "no score": (lambda: Two(NET, blocks=[Silent()]).fit([IMAGES], **ALONE), ValueError, "at least one score"),
    "correction without a layer": (
        lambda: Two(HEAD).fit([(IMAGES, LABELS)], correct=True),
        ValueError, "correct=True needs a model that ends in a linear layer",
    ),
    "scripted": (lambda: Two(nn.Sequential(scripted())), TypeError, "ordinary modules; '0' was a"),
    "large seed": (lambda: Two(NET, seed=2**32), ValueError, "seed must be below .* it was 4294967296"),
    "meta": (lambda: Two(copy.deepcopy(NET).to("meta")).fit([IMAGES], **ALONE), ValueError, "0.weight.* meta"),
    "inference": (lambda: Two(made_in_inference_mode()).fit([IMAGES]), ValueError, "model .* inference mode"),
    "meta inputs": (lambda: Two(NET).fit([IMAGES.to("meta")], **ALONE), ValueError, "of clean must be dense"),
    "sparse": (lambda: Two(NET).fit([IMAGES], challenges=[IMAGES.to_sparse()]), ValueError, "challenges must be dense"),
    "no answer": (lambda: Two(NET).fit([IMAGES], challenges=[WITHOUT]), ValueError, "challenges must .* 60 it"),
    "no answer to some": (
        lambda: Two(Net(lambda net, x: net.net(x.log()), net=NET)).fit([0.1 + 0.8 * IMAGES]), ValueError,
        r"challenges must give .* NaN or infinity\. They were generated: give the clip of the images, a loader",
    ),
    "no answers": (lambda: Two(NET).fit([IMAGES], **ALONE, calibration=[WITHOUT]), ValueError, "calibration .* 60 it"),
    "a share and a loader": (
        lambda: Two(NET, detector=UncertaintyDetector(calibration_fraction=0.5)).fit(IMAGES, calibration=[0]),
        ValueError, "calibration must be None where the detector's calibration_fraction is given, 0.5",
    ),
    "swapped": (lambda: Two.load(NET, "file"), TypeError, r"path must be a path; it was (?s:.{5,80})$"),  # type: ignore[arg-type]
    "unknown file": (lambda: Two.load("no/such.safetensors", NET), FileNotFoundError, "no/such"),
}  # fmt: skip


test_bad_arguments = pytest.mark.filterwarnings("ignore:.torch.jit")(refused(BAD))
