"""What holds for each score of each block: stored it is the same, and its p-values are uniform and monotone."""

from __future__ import annotations

import functools

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from fastgrad.blocks import BLOCKS
from fastgrad.scores.conformal import PValues
from fastgrad.scores.fitted import FittedList, rebuild
from fastgrad.scores.one_class import Part, Settings

#: Shapes of one sample; others have one of eight columns.
SHAPES = {"logits": (5,), "view": (1,), "contrasts": (5,), "gradients": (2, 6)}
CASES = [(name, place) for name, block in BLOCKS.items() for place in range(len(block.scores))]


def rows(name: str, count: int, seed: int) -> Tensor:
    """Correlated columns, positive where a block holds squared norms."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES.get(name, (8,))
    x = torch.randn(count, *shape, generator=generator) + torch.randn(count, *(1 for _ in shape), generator=generator)
    return x.exp() if BLOCKS[name].squared_norms else x


@functools.cache
def fitted(name: str, place: int) -> Part:
    block = BLOCKS[name]
    part = block.scores[place](name, {name: rows(name, 400, 0)}, Settings(block.squared_norms, True, 400))
    assert part is not None
    return part


def scored(part: Part, name: str, x: Tensor) -> Tensor:
    _, columns, score = part
    found: Tensor = score(columns({name: x}))
    return found


def test_every_block_has_a_score() -> None:
    assert {name for name, _ in CASES} == set(BLOCKS)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_stored_it_is_the_same(name: str, place: int) -> None:
    label, columns, score = fitted(name, place)
    whole = FittedList(rows=columns, score=score)
    again = rebuild(whole.spec(), whole.state_dict())
    x = rows(name, 9, 1)
    other: Part = (label, again.get_submodule("rows"), again.get_submodule("score"))  # type: ignore[assignment]
    assert torch.equal(scored(other, name, x), scored(fitted(name, place), name, x))


@pytest.mark.parametrize(("name", "place"), CASES)
def test_samples_are_scored_alone(name: str, place: int) -> None:
    x = rows(name, 40, 2)
    whole = scored(fitted(name, place), name, x)
    assert whole.shape == (40,)
    assert whole.isfinite().all()
    halves = torch.cat([scored(fitted(name, place), name, part) for part in x.flip(0).split(13)]).flip(0)
    torch.testing.assert_close(halves, whole)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_p_values_of_clean_samples_are_uniform_and_monotone(name: str, place: int) -> None:
    part = fitted(name, place)
    two_sided = bool(part[2].options.get("two_sided"))
    new = scored(part, name, rows(name, 2000, 4))
    p_values = PValues.fit(scored(part, name, rows(name, 2000, 3)).unsqueeze(0), [two_sided])
    log_p = p_values(new.unsqueeze(0))[0]
    # Both samples deviate: the two-sample statistic of 2,000 each is below .062 in 999 of 1,000 draws.
    assert kstest(log_p.exp().numpy(), "uniform").statistic < 0.062
    order = new.argsort()
    falling = log_p[order].diff()
    if two_sided:  # it rises from the lowest score to some score, and falls from there
        top = int(log_p[order].argmax())
        assert (falling[:top] >= 0).all()
        falling = falling[top:]
    assert (falling <= 0).all()
