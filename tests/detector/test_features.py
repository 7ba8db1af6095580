"""Features are what a network yields and all that a detector knows: read, joined, kept, fitted on, answered from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bad_arguments import refused
from small_images import CLASSES, images, small_network
from torch import Tensor

from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS, Features
from fastgrad.blocks.extraction import Extraction
from fastgrad.detector.collect import features_of

X, Y = images(90), torch.arange(90) % CLASSES


def assert_close(found: Features, expected: Features) -> None:
    """Compare two records; float32 rounds by the batch."""
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.blocks, expected.blocks, rtol=1e-3, atol=1e-3)
    assert found.kinds == expected.kinds
    for name in ("sources", "labels", "held_out"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_read_together_is_what_is_read_apart(name: str) -> None:
    reader = Extraction(small_network().eval(), [BLOCKS[name]()])
    a, b = images(5, 1), images(3, 2)
    joined = Features.cat([features_of(reader, a), features_of(reader, b)])
    assert_close(features_of(reader, torch.cat([a, b])), joined)
    assert_close(joined.at(torch.arange(5)), features_of(reader, a))
    assert_close(Features.cat([joined.at(joined.codes > 0), joined.at(joined.codes == 0)]), joined)


def test_features_give_fit_and_answer() -> None:
    model = TwoStageModel(small_network(), blocks=[*DEFAULT_BLOCKS, "features"]).fit(X, Y, correct="always")
    features = model.read_features(X, Y)
    assert len(features) == 4 * len(X)
    again = TwoStageModel(model.model, blocks=model.blocks).fit_features(features, correct="always")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for left in (model.report(), again.report()):
        assert (left.drawn, sum(left.challenges.values()), left.predicted) == (90, 270, 1)
    assert again.report().passes is None
    assert "270 of 15 kinds\n" in str(again.report())
    new = images(20, 5)
    assert torch.equal(again(new).uncertainty, model(new).uncertainty)
    reader = model.extraction_
    assert reader is not None
    from_features = again.predict_features(features_of(reader, new))
    for one, other in zip(from_features, model(new), strict=True):
        torch.testing.assert_close(one, other)


def test_numbers_of_kinds_and_sources() -> None:
    features = Features.of(
        torch.zeros(5, 2), {}, kinds=["noise", "", "blur", "", "noise"], sources=torch.tensor([7, 7, -1, 3, -1]),
        held_out=torch.tensor([False, True, False, False, False]),
    )  # fmt: skip
    assert features.codes.tolist() == [2, 0, 1, 0, 2]
    first, second, *others = features.source_numbers.tolist()
    assert first == second
    assert len({first, *others}) == 4
    assert features.at(features.challenging).kinds == ["noise", "blur", "noise"]
    assert features.at(~features.challenging).held_out.tolist() == [True, False]


def of(**columns: Any) -> Features:
    return Features.of(torch.zeros(30, 3), {"logits": torch.randn(30, 3)}, **columns)


MODEL = TwoStageModel(small_network(), blocks=["image"])
test_bad_arguments = refused([
    (lambda: of(labels=torch.zeros(5)), ValueError, "a row for each of 30 inputs.*; it had 5"),
    (lambda: of(kinds=["noise"]), ValueError, "it had 1"),
    (lambda: Features.of(torch.zeros(3, 2), {"logits": torch.zeros(2, 2)}), ValueError, "it had 2"),
    (lambda: MODEL.fit_features({"logits": X}), TypeError, "must be a Features; it was dict"),
    (lambda: MODEL.predict_features(X), TypeError, "must be a Features; it was Tensor"),
    (lambda: MODEL.fit_features(of()), ValueError, r"the blocks \['image'\]; they had \['logits'\]"),
    (lambda: TwoStageModel(MODEL.model).fit_features(of(), risk=True), ValueError, "at least 30 .* labels"),
    (lambda: TwoStageModel(MODEL.model).fit_features(of(), correct=True), ValueError, "no labels"),
    (lambda: MODEL.fit_features(
        Features.of(torch.zeros(30, 3), {"image": torch.full((30, 3), torch.nan)})), ValueError, "must be finite"),
])  # fmt: skip


def test_what_is_answered_from_features_needs_their_blocks() -> None:
    model = TwoStageModel(small_network(), blocks=["image"]).fit(X, challenges=None)
    features = TwoStageModel(model.model, blocks=["image", "logits"]).read_features(X, challenges=None)
    for one, other in zip(
        model.predict_features(features), model.predict_features(features.only(["image"])), strict=True
    ):
        assert one is other is None or torch.equal(one, other)
    with pytest.raises(ValueError, match=r"the blocks \['image'\]; they had \['logits'\]"):
        model.predict_features(of())
    with pytest.raises(RuntimeError, match="must be fitted first"):
        TwoStageModel(small_network()).predict_features(of())


def test_equal_rows_are_no_numbers_of_the_network() -> None:
    """A detector of features alone has a network only to answer with: another one may have read them."""
    generator = torch.Generator().manual_seed(0)
    values: Tensor = torch.randn(60, 28, generator=generator)
    model = TwoStageModel(small_network(), blocks=["image"])
    model.fit_features(Features.of(torch.randn(60, CLASSES, generator=generator), {"image": values}))
    answer = model.predict_features(
        Features.of(torch.zeros(2, CLASSES), {"image": torch.stack([values[0], 50 + values[0]])})
    )
    assert answer.uncertainty[1] > answer.uncertainty[0] + 1
    assert answer.risk is None
