"""An error rate without labels: the estimated share of wrong answers in streams of unlabelled inputs.

A stream mixes clean inputs of the test part with cases, drawn with replacement; every answer to an input of no class is
wrong. Estimates that need labelled clean inputs have all those that nothing was trained on: those of the fit, and a
part of the test inputs that no stream shows. Scores that need labelled shifts (nuclear norm, MaNo) are regressed on
streams of the generated challenges that the risk is fitted on. The form of our estimate was chosen on ``CHOSEN_ON``.

For the lower end of the interval there are rows of another kind: how much of the risk comes true for each kind of
generated challenge, of a fit without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from bench.detection import runner
from bench.detection.cases import ALIKE, CHANGED_FILES, CHANGED_TEXTS, UNALIKE
from bench.detection.experiment import CASES, Experiment, Fit, Options
from bench.detection.failure import judged
from bench.detection.methods_ours import answer, blocks_of, fitted, read_for
from bench.detection.registry import NETWORKS
from fastgrad import TwoStageModel
from fastgrad.blocks import DEFAULT_BLOCKS, Block
from fastgrad.deploy.error_rate import error_rate

Values = NDArray[np.float64]
DEFAULT_NETWORKS = ("resnet56", "densenet", "lite0", "lite1", "lite2", "news", "magika")
CHOSEN_ON, OURS, LEFT_OUT_KIND = ("resnet56", "lite0", "magika"), "fastgrad", "risk, kind left out"
#: Groups of cases by the name in the table; a mixed stream has up to four cases of any group.
GROUPS: Mapping[str, tuple[str, ...]] = {
    ALIKE: (ALIKE, CHANGED_TEXTS[0], CHANGED_FILES[0]), UNALIKE: (UNALIKE, CHANGED_TEXTS[1], CHANGED_FILES[1]),
    "attacks": ("attacks",), "attacks after JPEG": ("attacks after JPEG",), "near sets": ("near sets",),
    "far sets": ("far sets",), "other sets": ("other sets", "other texts", "foreign files"),
}  # fmt: skip
#: Attacks that take an hour.
LEFT_OUT = ("C&W", "DeepFool")
SIZES, SHARES, STREAMS = (100, 300, 1000), (0.0, 0.1, 0.3, 0.6), 10
#: With more classes, streams and labelled inputs hold different ones, and nothing can be moved between them.
MANY = 20
#: Share of the test inputs that are labelled for the estimates, and in no stream.
KNOWN = 0.4


class Answers(NamedTuple):
    """Answers to some inputs, ``(n, N)`` or ``(n,)``."""

    logits: Values
    probabilities: Values
    risk: Values
    uncertainty: Values
    wrong: Values
    labels: NDArray[np.int64]

    def at(self, places: NDArray[Any] | slice) -> Answers:
        return Answers(*(values[places] for values in self))


class Known(NamedTuple):
    """What the estimates know: labelled clean inputs and challenges.

    ``fitted`` is the number of clean inputs that the detector was fitted on, ``wrong_above`` its own limit of the risk.
    """

    clean: Answers
    generated: list[Answers]
    temperature: float
    fitted: int
    wrong_above: float


def softmax(logits: Values) -> Values:
    values = np.exp(logits - logits.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)


def tempered(known: Known, logits: Values) -> Values:
    return softmax(logits / known.temperature)


def at_threshold(known: Known, stream: Answers, score: Callable[[Values], Values]) -> float:
    """ATC (Garg et al., ICLR 2022): the share below the score that as many clean inputs are below as are wrong."""
    clean, seen = (score(tempered(known, part.logits)) for part in (known.clean, stream))
    return float((seen < np.quantile(clean, known.clean.wrong.mean())).mean())


def of_confidences(known: Known, stream: Answers) -> float:
    """DoC (Guillory et al., ICCV 2021): the error rate of clean inputs and the fall of the mean confidence."""
    clean, seen = (tempered(known, part.logits).max(1).mean() for part in (known.clean, stream))
    return float(known.clean.wrong.mean() + clean - seen)


def costs(p: Values, labels: NDArray[np.int64]) -> Values:
    """Return what it costs to move each row of the probabilities to its own label, at the least total cost."""
    if p.shape[1] > MANY:
        return np.full(len(p), np.nan)
    cost = 1 - p[:, labels]
    rows, columns = linear_sum_assignment(cost)
    found: Values = cost[rows, columns]
    return found


def transport(known: Known, stream: Answers) -> Values:
    """Return the costs of moving a stream's probabilities to labels drawn as clean ones are."""
    places = np.linspace(0, len(known.clean.labels) - 1, len(stream.logits)).round().astype(int)
    return costs(tempered(known, stream.logits), np.sort(known.clean.labels)[places])


def of_transport(known: Known, stream: Answers) -> float:
    """COT (Lu et al., NeurIPS 2023): the mean of those costs."""
    return float(transport(known, stream).mean())


def of_costs(known: Known) -> Callable[[Answers], float]:
    """COTT (Lu et al., NeurIPS 2023): the share above the cost that as many clean inputs are above as are wrong."""
    clean = costs(tempered(known, known.clean.logits), known.clean.labels)
    threshold = np.quantile(clean, 1 - known.clean.wrong.mean())

    def share(stream: Answers) -> float:
        moved = transport(known, stream)
        return float(np.where(np.isnan(moved), np.nan, moved > threshold).mean())

    return share


def nuclear(stream: Answers) -> float:
    """Nuclear norm of the probabilities, between 0 and 1 (Deng et al., ICML 2023)."""
    p = softmax(stream.logits)
    return float(np.linalg.norm(p, "nuc") / np.sqrt(min(p.shape) * len(p)))


def mano(stream: Answers) -> float:
    """MaNo (Xie et al., NeurIPS 2024): the L4 norm of normalised logits.

    Logits are normalised by the softmax, or by its Taylor series if the softmax is far from uniform on average.
    """
    z = stream.logits
    values = softmax(z) if -np.log(np.maximum(softmax(z), 1e-30)).mean() > 5 else 1 + z + z**2 / 2
    values = values / values.sum(1, keepdims=True)
    return float((values**4).mean() ** 0.25)


def regressed(known: Known, score: Callable[[Answers], float]) -> Callable[[Answers], float]:
    """Return the error rate by a linear regression on streams of clean inputs and generated challenges."""
    x, y = zip(*((score(part), part.wrong.mean()) for part in known.generated), strict=True)
    slope, start = np.polyfit(x, y, 1)
    return lambda stream: start + slope * score(stream)


def estimates(known: Known) -> dict[str, Callable[[Answers], tuple[float, ...]]]:
    """Return the estimates of a stream's error rate by name; ours with the bounds of its interval."""

    def negative_entropy(p: Values) -> Values:
        return (p * np.log(np.maximum(p, 1e-30))).sum(1)

    by_nuclear, by_mano = (regressed(known, score) for score in (nuclear, mano))
    alone: dict[str, Callable[[Answers], float]] = {
        "mean of 1 - softmax": lambda s: float(1 - softmax(s.logits).max(1).mean()),
        "the same, temperature": lambda s: float(1 - tempered(known, s.logits).max(1).mean()),
        "ATC, confidence": lambda s: at_threshold(known, s, lambda p: p.max(1)),
        "ATC, entropy": lambda s: at_threshold(known, s, negative_entropy),
        "DoC": lambda s: of_confidences(known, s),
        "COT": lambda s: of_transport(known, s),
        "COTT": of_costs(known),
        "nuclear norm": by_nuclear,
        "MaNo": by_mano,
        "mean of the risk": lambda s: float(s.risk.mean()),
    }
    ours = {OURS: lambda s: error_rate(s.risk, s.uncertainty, known.wrong_above, known.fitted)}
    return {name: lambda s, one=one: (float(np.clip(one(s), 0, 1)),) for name, one in alone.items()} | ours


def answers(experiment: Experiment, case: str, two_stage: Any) -> Answers:
    seen = experiment.seen(case)
    found = answer(two_stage, seen)
    parts = (part.double().numpy() for part in (found.logits, found.probabilities, found.risk, found.uncertainty))
    logits, probabilities, risk, uncertainty = parts
    labels = experiment.parts["test"][1].numpy()[seen.shown.source.clamp_min(0).numpy()]
    return Answers(logits, probabilities, risk, uncertainty, judged(experiment, case).wrong, labels)


def joined(parts: Sequence[Answers]) -> Answers:
    return Answers(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def of_fit(experiment: Experiment, rng: np.random.Generator) -> tuple[Answers, list[Answers]]:
    """Return the clean inputs of the fit, and streams of them and of each kind of challenge generated from them."""
    kept = experiment.kept("inputs/generated/fit", dict)
    logits = blocks_of(experiment, "generated/fit", experiment.parts["fit"][0], ["logits"])["logits"].double().numpy()
    labels = experiment.parts["fit"][1].numpy()[kept["groups"]]
    none = np.full(len(labels), np.nan)
    every = Answers(logits, softmax(logits), none, none, (logits.argmax(1) != labels).astype(float), labels)
    places = {kind: np.flatnonzero(kept["kinds"] == kind) for kind in np.unique(kept["kinds"])}
    clean = places.pop("")
    streams = [
        every.at(np.concatenate([rng.choice(clean, round(300 * share)), rng.choice(own, 300 - round(300 * share))]))
        for own in places.values() for share in (*SHARES, 1.0)
    ]  # fmt: skip
    return every.at(clean), streams


def streams(
    clean: Answers, cases: Mapping[str, Answers], rng: np.random.Generator
) -> Iterator[tuple[str, float, int, Answers]]:
    """Yield group, share of clean inputs, size and answers of every stream."""
    groups = {
        name: found
        for name, parts in GROUPS.items()
        if (found := [case for case in cases if CASES[case].group in parts])
    }
    # As many clean streams as of another group.
    kinds = [("clean", 1.0)] * len(SHARES) + [(name, share) for name in (*groups, "mixed") for share in SHARES]
    for group, share in kinds:
        for size in SIZES:
            for _ in range(STREAMS):
                own = rng.binomial(size, share)
                parts = [clean.at(rng.integers(0, len(clean.wrong), own))]
                if group != "clean":
                    among, count = (list(cases), 4) if group == "mixed" else (groups[group], 1)
                    chosen = rng.choice(among, min(count, len(among)), replace=False)
                    counts = rng.multinomial(size - own, np.full(len(chosen), 1 / len(chosen)))
                    pairs = [(cases[case], number) for case, number in zip(chosen, counts, strict=True)]
                    parts += [case.at(rng.integers(0, len(case.wrong), number)) for case, number in pairs]
                yield group, share, size, joined(parts)


def of_kinds_left_out(experiment: Experiment, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """Yield the share of the risk that comes true for each kind of generated challenge, and the least of them.

    The kind's challenges are answered by a fit without the kind, on the clean inputs, and challenges made from them,
    that have no part in it: two fits, each on one half of the clean inputs, answer the other half.
    """
    features = read_for(Fit(experiment), blocks, "generate")
    kinds, half = np.array(features.kinds), features.sources.numpy() % 2
    came_true: dict[str, float] = {}
    for kind in sorted({*features.kinds} - {""}):
        risk, wrong = 0.0, 0
        for part in (0, 1):
            fit, seen = (features.at(torch.from_numpy(rows)) for rows in (
                (half == part) & (kinds != kind), (half != part) & (kinds == kind)
            ))  # fmt: skip
            two_stage = TwoStageModel(experiment.model, blocks=blocks, seed=experiment.draw).fit_features(fit)
            found = two_stage.predict_features(seen)
            risk, wrong = risk + float(found.risk.sum()), wrong + int((found.logits.argmax(1) != seen.labels).sum())
        came_true[kind] = round(wrong / risk, 3)
        yield {"case": kind, "came true": came_true[kind], "wrong": wrong, "inputs": int((kinds == kind).sum())}
    yield {"case": "least kind", "came true": min(came_true.values()), "kinds": len(came_true)}


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    rng = np.random.default_rng(experiment.draw)
    two_stage = fitted(Fit(experiment), DEFAULT_BLOCKS)
    cases = {}
    for name, case in CASES.items():
        if experiment.kind in case.kinds and case.group in sum(GROUPS.values(), ()) and not name.startswith(LEFT_OUT):
            try:
                cases[name] = answers(experiment, name, two_stage)
            except runner.ABSENT as why:
                if "misleads" not in str(why):
                    raise
    whole = answers(experiment, "clean", two_stage)
    # The cases are made from the first images.
    first = round((1 - KNOWN) * len(whole.wrong))
    shown, unseen = whole.at(slice(first)), whole.at(slice(first, None))
    fit, generated = of_fit(experiment, rng)
    temperature = float(two_stage.temperature_.temperature)
    every = estimates(Known(joined([fit, unseen]), generated, temperature, len(fit.wrong), two_stage.wrong_above))
    found: dict[str, list[tuple[str, float, int, float, float, float]]] = {name: [] for name in every}
    for group, share, size, stream in streams(shown, cases, rng):
        truth = float(stream.wrong.mean())
        for name, estimate in every.items():
            value, low, high = (*estimate(stream), np.nan, np.nan)[:3]
            found[name].append((group, share, size, 100 * (value - truth), low <= truth <= high, 100 * (high - low)))
    head = {"network": experiment.network, "draw": experiment.draw}
    left_out = of_kinds_left_out(experiment, two_stage.extraction_.blocks)
    return [
        *(head | {"method": name} | row for name, values in found.items() for row in summed(values, name == OURS)),
        *(head | {"method": LEFT_OUT_KIND} | row for row in left_out),
    ]


def summed(
    values: Sequence[tuple[str, float, int, float, float, float]], with_bounds: bool
) -> Iterator[dict[str, Any]]:
    """Yield the mean absolute error and the mean error in points by group, by size, by share, and of all groups.

    ``with_bounds`` adds the share of streams whose error rate lies in the interval, and the interval's mean width.
    """
    group, share, size, error, inside, width = (np.array(column) for column in zip(*values, strict=True))
    if np.isnan(error).any():
        yield {"not run": f"more than {MANY} classes"}
        return
    parts = {str(name): group == name for name in dict.fromkeys(group)}
    # Every group weighs the same, however many streams it has.
    weight = sum(own / own.sum() for own in parts.values()) / len(parts)
    parts |= {f"streams of {number:,}": size == number for number in SIZES}
    parts |= {f"{number:.0%} clean": share == number for number in (*SHARES, 1.0)}
    for case, own in {**parts, "all streams": size > 0}.items():
        w = weight * own / (weight * own).sum()
        row = {"case": case, "error": round(float(w @ np.abs(error)), 2), "bias": round(float(w @ error), 2)}
        bounds = {"inside": round(float(w @ inside), 3), "width": round(float(w @ width), 1)}
        yield row | (bounds if with_bounds else {})


def run(options: Options, networks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    about = {name: [NETWORKS[name].title, name in CHOSEN_ON] for name in DEFAULT_NETWORKS}
    facts = {"quick": options.quick, "networks": about, "sizes": SIZES, "shares": (*SHARES, 1.0), "streams": STREAMS}
    return runner.over(networks, options, measure), facts
