"""The table runner: what is absent is said and is in no mean, and a page names the strongest rival."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from sklearn.metrics import roc_auc_score

pytest.importorskip("pytorch_ood")

from bench.detection import registry, runner
from bench.detection.architectures import residual_network
from bench.detection.experiment import CASES, SMALL, Experiment, Fit, NotRun, Options, Seen, Shown
from bench.detection.registry import METHODS, NETWORKS, Method, Protocol
from bench.detection.tables import Table
from bench.report import pages

TABLE = Table("Trial", ("trial",), ("attacks", "sets"))


def _subject(options: Options, draw: int) -> Experiment:
    torch.manual_seed(draw)
    model = residual_network(width=4).eval().requires_grad_(False)
    parts = {part: (torch.rand(20, 3, 8, 8), torch.arange(20) % 10) for part in ("fit", "test")}
    return Experiment("trial", draw, model, parts, options, SMALL, 6, [model.stem, *model.stages])


@pytest.fixture
def options(tmp_path: Path) -> Iterator[Options]:
    with contextlib.ExitStack() as stack:
        for values in (METHODS, CASES, NETWORKS):
            stack.enter_context(mock.patch.dict(values, clear=True))  # type: ignore[arg-type]
        _register()
        yield Options(tmp_path, tmp_path / "cache", True)


def _register() -> None:
    registry.network("trial", "a network on noise")(_subject)

    for strength in (1, 2):

        @registry.case(f"brighter {strength}", "attacks", (SMALL,))
        def brighter(experiment: Experiment, part: str, count: int, strength: int = strength) -> Shown:
            places = torch.arange(strength, count)
            return Shown(experiment.parts[part][0][places] + strength, places)

    @registry.case("darker", "sets", (SMALL,))
    def darker(experiment: Experiment, part: str, count: int) -> Shown:
        return Shown(0 * experiment.parts[part][0][:count], torch.full((count,), -1))

    @registry.case("texts alone", "sets", ("texts",))
    def none(experiment: Experiment, part: str, count: int) -> Shown:
        raise AssertionError("there are no texts")

    _method("brightness", _brightness)


def _brightness(seen: Seen) -> torch.Tensor:
    return seen.images.mean((1, 2, 3))


def _method(name: str, score: registry.Score) -> None:
    """Register a score that needs no fit."""
    registry.method(name, 2026, "here")(lambda fit: score)


def _absent(problem: Exception) -> None:
    """Register a method, ``absent``, whose fit raises this."""

    @registry.method("absent", 2026, "nowhere")
    def absent(fit: Fit) -> registry.Score:
        raise problem


def _rows(options: Options) -> dict[tuple[str, str], dict[str, object]]:
    return {(row["method"], row["case"]): row for row in runner.run(TABLE, options) if "case" in row}


def test_figures_are_those_of_the_scores(options: Options) -> None:
    rows = _rows(options)
    images = _subject(options, 0).parts["test"][0]
    shown = torch.cat([images, images[1:6] + 1]).mean((1, 2, 3))
    expected = roc_auc_score(torch.arange(len(shown)) >= len(images), shown)
    assert rows["brightness", "brighter 1"]["auroc"] == pytest.approx(expected, abs=1e-4) == 1
    assert rows["brightness", "darker"]["auroc"] == 0
    assert rows["brightness", "mean of attacks"]["cases"] == 2
    assert ("brightness", "texts alone") not in rows
    assert rows["brightness", "mean of sets"]["interval"] == [0, 0]


def test_attack_has_gradients(options: Options) -> None:
    @registry.case("steeper", "attacks", (SMALL,))
    def steeper(experiment: Experiment, part: str, count: int) -> Shown:
        images = experiment.parts[part][0][:count].clone().requires_grad_(True)
        experiment.model(images).sum().backward()

        return Shown(images.detach() + images.grad.sign(), torch.arange(count))

    _method("without gradients", torch.no_grad()(_brightness))
    METHODS.pop("brightness")
    assert "auroc" in _rows(options)["without gradients", "steeper"]


def test_the_worst_attack_of_every_image_counts(options: Options) -> None:
    # Tells the stronger attack, and takes the weaker one for the most usual of all.
    _method("mixed", lambda seen: torch.where(_brightness(seen) > 2, 9.0, -_brightness(seen)))
    rows = _rows(options)
    assert rows["mixed", "brighter 2"]["auroc"] == 1
    assert rows["mixed", "brighter 1"]["auroc"] == 0
    assert rows["mixed", "mean of attacks"]["auroc"] == 0.5
    assert rows["mixed", f"{runner.WORST}, attacks"]["auroc"] == 0


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (ModuleNotFoundError("No module named 'absent'"), "No module named 'absent'"),
        (FileNotFoundError("DIR must hold a.npz"), "DIR must hold a.npz"),
        (NotRun("needs maps"), "needs maps"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_cannot_run_is_in_no_mean(options: Options, problem: Exception, words: str) -> None:
    _absent(problem)
    rows = _rows(options)
    assert {rows["absent", case]["not run"] for case in ("brighter 1", "darker", "mean of attacks")} == {words}
    assert not any("auroc" in row for (method, _), row in rows.items() if method == "absent")


def test_case_without_data_has_no_mean(options: Options) -> None:
    @registry.case("lost", "sets", (SMALL,))
    def lost(experiment: Experiment, part: str, count: int) -> Shown:
        raise FileNotFoundError("DIR must hold lost.npz")

    rows = _rows(options)
    assert rows["brightness", "darker"]["auroc"] == 0
    for case in ("lost", "mean of sets"):
        assert rows["brightness", case]["not run"] == "DIR must hold lost.npz", case


def test_an_error_of_this_package_is_not_hidden(options: Options) -> None:
    METHODS["fastgrad, broken"] = Method("fastgrad, broken", 2026, "", Protocol.CLEAN, lambda fit: 1 / 0)  # type: ignore
    with pytest.raises(ZeroDivisionError):
        runner.run(TABLE, options)


def test_labelled_methods_have_one_fit_for_each_case(options: Options) -> None:
    fitted: list[str] = []

    @registry.method("labelled", 2026, "here", Protocol.LABELLED)
    def labelled(fit: Fit) -> registry.Score:
        fitted.append(fit.case)
        centre = fit.challenges.images.mean()
        return lambda seen: -(_brightness(seen) - centre).abs()

    table = Table("Labelled", ("trial",), ("attacks",), (Protocol.LABELLED,))
    rows = {row["case"]: row for row in runner.run(table, options) if "case" in row}
    assert fitted == ["brighter 1", "brighter 2"]
    assert rows["mean of attacks"]["auroc"] == 1


def test_gain_of_a_block_is_resampled(options: Options) -> None:
    _method("brightness + nothing", _brightness)
    _method("brightness + all", lambda seen: (_brightness(seen) - 0.5).abs())
    rows = _rows(options)
    nothing, gain = (rows[f"brightness + {name}", "gain in sets"] for name in ("nothing", "all"))
    assert nothing["gain"] == 0
    assert nothing["interval"] == [0, 0]
    assert gain["gain"] == 1
    assert ("brightness", "gain in sets") not in rows


def test_page_names_strongest_rival(options: Options, tmp_path: Path) -> None:
    _absent(NotRun("needs maps"))
    _method("fastgrad, clean only", lambda seen: -_brightness(seen))
    facts = {
        "title": "Trial", "merit": "auroc", "quick": True,
        "seconds": 1, "networks": {"trial": ["a network on noise", False]},
        "methods": {key: [one.year, one.paper] for key, one in METHODS.items()},
    }  # fmt: skip
    path = pages.save("trial", runner.run(TABLE, options), packages=("torch",), folder=tmp_path, facts=facts)
    text = path.read_text()
    assert "| attacks | 2 | brightness 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] |" in text
    assert "Validation: nothing was tuned on this network, but changes that lost on it were not made." in text
    assert "| absent | 2026 | needs maps |" in text
    assert "### Clean data only" in text
    assert json.loads((tmp_path / "trial.json").read_text())["rows"]
    assert (tmp_path / "trial.png").exists()
