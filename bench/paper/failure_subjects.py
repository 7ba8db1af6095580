"""What failure prediction is measured on: five classifiers of news, and EfficientNet-Lite0 on photographs.

Each measures every method on clean and on corrupted inputs, its ensemble beside it. Detectors and temperatures are
fitted on clean inputs that the network was not trained on; the corrupted ones are for the test alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.paper.data.photographs import network
from bench.paper.draws import FAMILIAR, FOREIGN, Draw
from bench.paper.failures import ENSEMBLE, Answers, Judge, ensemble
from bench.paper.photograph_features import Photographs
from bench.paper.price import prices
from bench.paper.table import Options
from bench.paper.texts import CORRUPTED, News, batches
from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS
from fastgrad.detector.worth import USUAL

Batches = list[tuple[Any, Tensor]]
#: Every third kind, so that nobody chose them.
KINDS = FAMILIAR[::3] + FOREIGN[::3]
CLEAN, CORRUPT, TOGETHER = "clean", "corrupted", "clean and corrupted"
MEMBERS = 5
_BATCH = 16


class Found(NamedTuple):
    """What was measured on one network.

    Attributes:
        answers: By case and method, one for each network.
        source: By case, which inputs are copies of one ``(n,)``.
        passes: Price of a method in forward passes of the network, where it is not one.
        about: The network, its inputs and its ensemble, in words.
    """

    answers: dict[str, dict[str, list[Answers]]]
    source: dict[str, NDArray[np.int64]]
    passes: dict[str, float]
    about: str


class Texts:
    """Five classifiers of the news of one split."""

    name = "BERT on news"

    def __init__(self, options: Options) -> None:
        self.members = [News(options.data, options.cache, 0, member, short=True) for member in range(MEMBERS)]

    def prepare(self) -> None:
        """Train what the cache lacks."""
        for member in self.members:
            member.prepare()

    def measure(self) -> Found:
        """Every method on each network, and the five together."""
        news = self.members[0]
        fit, calibration, test = (_labelled(*news.news(part)) for part in ("fit", "calibration", "test"))
        labels = news.news("test")[1]
        sets = {"": test} | {name: _labelled(news.corrupted(name), labels) for name in CORRUPTED}
        judges = []
        for number, member in enumerate(self.members):
            model = TwoStageModel(member.model).fit(fit, (), calibration_loader=calibration, seed=number)
            judges.append(Judge(model, calibration))
        by_set: dict[str, dict[str, list[Answers]]] = {}
        for name, loader in sets.items():
            each, softmaxes = zip(*(judge(loader) for judge in judges), strict=True)
            by_set[name] = {method: [one[method] for one in each] for method in each[0]}
            by_set[name][ENSEMBLE] = [ensemble(softmaxes, loader)]
        costs = [judge.prices() for judge in judges]
        passes = {name: float(np.mean([one[name] for one in costs])) for name in costs[0]}
        about = (
            f"{MEMBERS} BERTs of four layers that read {news.length} pieces, trained for {news.epochs} epochs on "
            f"{len(news.news('train')[1]):,} news from other initial weights and in another order; "
            f"every other row is a mean over them. {len(labels):,} test news; corrupted: "
            "the same, three times: with words dropped (each with a chance of two fifths), with typos (in each word of "
            "four letters or more, with a chance of a half, two inner letters change places), and with all words "
            f"shuffled. The ensemble is a deep ensemble of these {MEMBERS}"
        )
        source = dict.fromkeys(sets, np.arange(len(labels)))
        return Found(*_pooled(by_set, source), {**passes, ENSEMBLE: float(MEMBERS)}, about)


class Pictures:
    """EfficientNet-Lite0 on the photographs of a draw."""

    name = "EfficientNet-Lite0 on photographs"

    def __init__(self, options: Options) -> None:
        self.draw = Draw(options.data, options.cache, 1)
        self.photographs = Photographs(self.draw, [BLOCKS[name] for name in USUAL], each=2)

    def prepare(self) -> None:
        """Make what the cache lacks."""
        _ = self.photographs.samples
        for kind in KINDS:
            self.draw.case(kind)

    @cached_property
    def others(self) -> list[nn.Module]:
        """Lite1 and Lite2."""
        return [network(pixels=True, size=size).to(memory_format=torch.channels_last) for size in (1, 2)]

    def _ensemble_price(self, x: Tensor) -> float:
        calls = {str(place): partial(_logits, model, x) for place, model in enumerate(self.others)}
        return 1 + sum(prices(self.draw.model, x, calls).values())

    def measure(self) -> Found:
        """Every method on the one network, and the three together."""
        draw = self.draw
        calibration, test = (_images(*draw.clean(part)) for part in ("calibration", "test"))
        label = dict(zip(draw.places["test"].tolist(), draw.clean("test")[1], strict=True))
        cases = {kind: draw.case(kind) for kind in KINDS}
        sets = {"": test} | {
            kind: _images(case.images, torch.stack([label[place] for place in case.source.tolist()]))
            for kind, case in cases.items()
        }
        judge = Judge(self.photographs.fitted(USUAL), calibration)
        by_set: dict[str, dict[str, list[Answers]]] = {}
        for name, loader in sets.items():
            answers, softmax = judge(loader)
            members = [softmax, *(_softmax(other, loader) for other in self.others)]
            by_set[name] = {method: [own] for method, own in answers.items()}
            by_set[name][ENSEMBLE] = [ensemble(members, loader)]
        source = {"": draw.places["test"]} | {kind: case.source for kind, case in cases.items()}
        passes = {**judge.prices(), ENSEMBLE: self._ensemble_price(test[0][0])}
        count = draw.sizes.case
        about = (
            f"{len(source['']):,} clean test photographs of the second draw; corrupted: {count} of them in each of "
            f"{len(KINDS)} ways ({', '.join(kind.replace('_', ' ') for kind in KINDS)}; severity 2). The ensemble is "
            "none of five equal networks: it is the published Lite0, Lite1 and Lite2, three of different sizes and "
            "inputs (enlarged to 240 and 260 pixels), the larger two better by themselves"
        )
        return Found(*_pooled(by_set, source), passes, about)


def _labelled(inputs: dict[str, Tensor], labels: Tensor) -> Batches:
    return list(zip(batches(inputs), labels.split(50), strict=True))


def _images(images: Tensor, labels: Tensor) -> Batches:
    parts = images.contiguous(memory_format=torch.channels_last).split(_BATCH)
    return list(zip(parts, labels.split(_BATCH), strict=True))


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def _softmax(model: nn.Module, loader: Batches) -> Tensor:
    return torch.cat([_logits(model, x).double().softmax(1) for x, _ in loader])


def _pooled(
    by_set: Mapping[str, Mapping[str, Sequence[Answers]]], source: Mapping[str, NDArray[np.int64]]
) -> tuple[dict[str, dict[str, list[Answers]]], dict[str, NDArray[np.int64]]]:
    """The three cases, from the clean set and each kind's."""
    kinds = [name for name in by_set if name]
    answers, sources = {}, {}
    for case, names in {CLEAN: [""], CORRUPT: kinds, TOGETHER: ["", *kinds]}.items():
        answers[case] = {
            method: [
                Answers(*(np.concatenate(parts) for parts in zip(*copies, strict=True)))
                for copies in zip(*(by_set[name][method] for name in names), strict=True)
            ]
            for method in by_set[""]
        }
        sources[case] = np.concatenate([source[name] for name in names])
    return answers, sources
