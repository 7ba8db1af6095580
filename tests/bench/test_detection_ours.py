"""What the tables keep of the blocks gives the detector that a user's `TwoStageModel.fit` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

pytest.importorskip("pytorch_ood")

from bench.detection import methods_ours, methods_outputs, registry  # noqa: F401
from bench.detection.architectures import residual_network
from bench.detection.data import news
from bench.detection.experiment import CASES, SMALL, TEXTS, Experiment, Fit, Options, Shown
from bench.detection.methods_ours import MADE, AllNorms, NormalisationNorms, answer, blocks_of, fitted, read_for
from fastgrad import TwoStageModel
from fastgrad.blocks import DEFAULT_BLOCKS


@pytest.fixture
def experiment(tmp_path: Path) -> Iterator[Experiment]:
    torch.manual_seed(0)
    # Narrower ones end PyTorch on processors without AVX-512: the backward pass of a strided 1x1 convolution of fewer
    # than eight channels, channels last, writes beyond its memory.
    model = residual_network(width=8).eval().requires_grad_(False)
    parts = {part: (torch.rand(40, 3, 16, 16), torch.arange(40) % 10) for part in ("fit", "test")}

    @registry.case("darker", "sets", (SMALL,))
    def darker(experiment: Experiment, part: str, count: int) -> Shown:
        return Shown(0.3 * experiment.parts[part][0][:count], torch.full((count,), -1))

    yield Experiment("trial", 0, model, parts, Options(tmp_path, tmp_path), SMALL, 6, [model.stem, *model.stages])
    del CASES["darker"]


def test_a_fit_on_kept_blocks_is_the_users(experiment: Experiment) -> None:
    fit = Fit(experiment)
    kept = fitted(fit, DEFAULT_BLOCKS, None)
    direct = TwoStageModel(experiment.model, blocks=DEFAULT_BLOCKS, seed=0)
    direct.fit(fit.loader(*experiment.parts["fit"]), challenges=None)
    seen = experiment.seen("darker")
    expected, found = direct(seen.images), answer(kept, seen)
    torch.testing.assert_close(found.uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-6)
    assert found.risk is not None
    torch.testing.assert_close(found.risk, expected.risk, rtol=1e-4, atol=1e-6)
    again = fitted(fit, DEFAULT_BLOCKS, None)
    assert torch.equal(answer(again, seen).uncertainty, found.uncertainty)


def test_challenges_are_those_of_a_fit(experiment: Experiment) -> None:
    fit = Fit(experiment)
    blocks = [MADE[name]() for name in DEFAULT_BLOCKS]
    kept = read_for(fit, blocks, "generate").only(DEFAULT_BLOCKS)
    with torch.enable_grad():
        direct = TwoStageModel(experiment.model, blocks=blocks).read_features(fit.loader(*experiment.parts["fit"]))
    assert kept.kinds == direct.kinds
    assert "noise" in kept.kinds
    for name in ("sources", "labels", "held_out"):
        assert torch.equal(getattr(kept, name), getattr(direct, name))
    for name, value in direct.blocks.items():
        torch.testing.assert_close(kept.blocks[name], value, rtol=1e-4, atol=1e-4)


def test_images_as_they_are_differ_from_shifted_ones(experiment: Experiment) -> None:
    fit, blocks = Fit(experiment), [MADE["logits"]()]
    clean = experiment.parts["fit"][0]
    plain, shifted = (read_for(fit, blocks, None, shifts=shifts) for shifts in (False, True))
    assert torch.equal(plain.sources, shifted.sources)
    torch.testing.assert_close(plain.logits, experiment.model(clean)[plain.sources], rtol=1e-4, atol=1e-5)
    assert 0 < float((plain.logits != shifted.logits).any(1).double().mean()) < 1


def test_norms_of_normalisation_layers_are_those_of_vectors(experiment: Experiment) -> None:
    images = experiment.seen("clean").images
    found = blocks_of(experiment, "clean/test", images, [AllNorms.name, NormalisationNorms.name])
    names = [name for name, value in experiment.model.named_parameters() if value.dim() == 1]
    assert found[NormalisationNorms.name].shape[-1] == len(names)
    assert all("bn" in name or "stem.1" in name or "shortcut.1" in name or name == "fc.bias" for name in names)
    model = experiment.model.requires_grad_(True)
    expected = []
    for x in images[:3].double():
        model.double().zero_grad()
        z = model(x[None])
        torch.nn.functional.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="sum").backward()
        expected.append([float(p.grad.square().sum().log()) for p in model.parameters() if p.dim() == 1])  # type: ignore
    model.float().requires_grad_(False)
    torch.testing.assert_close(
        found[NormalisationNorms.name][:3, 0].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
    )


def of_texts(tmp_path: Path, ids: Tensor) -> Experiment:
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = news.Classifier(BertModel(config, add_pooling_layer=False), nn.Linear(16, 3)).eval().requires_grad_(False)
    parts = {part: (ids, torch.arange(len(ids)) % 3) for part in ("fit", "test")}
    return Experiment("trial", 0, model, parts, Options(tmp_path, tmp_path), TEXTS, 6)


def test_the_control_of_texts_has_their_challenges(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experiment = of_texts(tmp_path, nn.functional.pad(torch.randint(1, 50, (120, 12), generator=generator), (0, 4)))
    challenges = methods_ours._Generated(experiment, "generated", "fit")
    assert challenges.images.dtype == torch.int64
    assert 340 < len(challenges.images) <= 360
    score = methods_ours.control(Fit(experiment))
    assert score(challenges).mean() > score(experiment.seen("clean", "fit")).mean()


def test_control_learns_from_other_images(tmp_path: Path) -> None:
    ids = 1 + torch.arange(60)[:, None].expand(60, 4) % 49
    experiment = of_texts(tmp_path, ids)
    second = methods_ours._Second(experiment)
    whole = experiment.seen("clean", "fit")
    assert torch.equal(second.clean.h, whole.h[30:])
    assert torch.equal(second.clean.images, whole.images[30:])
    assert torch.equal(second.clean.shown.source, torch.arange(30, 60))
    assert torch.equal(second.labels, torch.arange(30, 60) % 3)
    made = methods_ours._Generated(experiment, "generated", "fit").shown.source
    assert 50 < len(set(made.tolist()) & set(range(60))) == len(set(made.tolist()))


def test_padding_is_no_part_of_a_text(tmp_path: Path) -> None:
    alone = torch.randint(1, 50, (6, 5))
    padded = nn.functional.pad(alone, (0, 4))
    experiment = of_texts(tmp_path, padded)
    torch.testing.assert_close(experiment.model(padded), experiment.model(alone))
    found = blocks_of(experiment, "padded", padded, DEFAULT_BLOCKS)
    for name, value in blocks_of(experiment, "alone", alone, DEFAULT_BLOCKS).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert "activations" in found
