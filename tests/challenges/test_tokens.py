"""Challenges of token ids: what each kind leaves of an input, what stays, and that a detector is fitted on them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn

from fastgrad import TwoStageModel
from fastgrad.challenges.tokens import FAR, SHARES, TOKEN_CHALLENGES, generate_token_challenges, ids_of

PAD, BEGIN, END = 1, 2, 3


def texts(count: int = 40, width: int = 24, *, first: int = 0, before: bool = False) -> list[list[int]]:
    """Texts of words that occur once in each, between marks, of several lengths."""
    generator = torch.Generator().manual_seed(first)
    rows = []
    for number in range(first, first + count):
        words = (torch.randperm(200, generator=generator)[: width - 2 - number % 9] + 10).tolist()
        padding = [PAD] * (width - 2 - len(words))
        rows.append([*padding, BEGIN, *words, END] if before else [BEGIN, *words, END, *padding])
    return rows


def batches(form: str) -> list[Any]:
    """Two widths, padded after or before the tokens, with a mask or without."""
    before = form.startswith("before")
    parts = [torch.tensor(texts(first=first, width=width, before=before)) for first, width in ((0, 24), (40, 17))]
    if form.endswith("alone"):
        return parts
    return [{"input_ids": x.int(), "attention_mask": (x != PAD).to(torch.uint8)} for x in parts]


def ids(x: Any) -> Tensor:
    return (x if isinstance(x, Tensor) else x["input_ids"]).long()


def words(row: Tensor) -> list[int]:
    """The tokens of an input, in order; padding must be together, and marks at both ends."""
    real = row[row != PAD].tolist()
    places = (row != PAD).nonzero()[:, 0]
    assert places[-1] - places[0] + 1 == len(real)
    assert (real[0], real[-1]) == (BEGIN, END)
    return real[1:-1]


@pytest.mark.parametrize("form", ["after", "before", "after alone", "before alone"])
def test_share_of_altered_tokens(form: str) -> None:
    clean = batches(form)
    rows = [row for x in clean for row in ids(x)]
    known = set(torch.cat(list(rows)).tolist())
    counts: Counter[str] = Counter()
    sources: Counter[int] = Counter()
    shares: dict[str, set[float]] = {name: set() for name in TOKEN_CHALLENGES}
    for x, kinds, numbers in generate_token_challenges(clean, range(5, 80), each=3, seed=0):
        like = clean[numbers[0] >= 40]
        assert type(x) is type(like)
        assert ids(x).shape[1] == ids(like).shape[1]
        if not isinstance(x, Tensor):
            assert {name: part.dtype for name, part in x.items()} == {name: part.dtype for name, part in like.items()}
            assert torch.equal(x["attention_mask"] > 0, ids(x) != PAD)
        for row, kind, number in zip(ids(x), kinds, numbers.tolist(), strict=True):
            before, after = words(rows[number]), words(row)
            # Of a tensor alone, which may be a table, an id stays out of columns that have only smaller ones.
            table = form.endswith("alone")
            if kind == "omission":
                share = (len(before) - len(after)) / len(before)
                assert table or after == [word for word in before if word in set(after)]
                # Padding stays on its side.
                assert (row[0] == PAD) == form.startswith("before")
            elif kind == "transposition":
                share = 0.0
                assert table or sorted(after) == sorted(before)
                farthest = max(abs(before.index(word) - place) for place, word in enumerate(after) if word in before)
                assert 1 <= farthest <= 3 * FAR
            else:
                changed = [a for a, b in zip(after, before, strict=True) if a != b]
                share = len(changed) / len(before)
                assert set(changed) <= known - {PAD, BEGIN, END}
            assert share <= max(SHARES) + 1 / len(before)
            shares[kind].add(round(share, 1))
        counts.update(kinds)
        sources.update(numbers.tolist())
    assert set(sources) == set(range(5, 80))
    assert set(sources.values()) <= {2, 3}
    assert sum(counts.values()) > 220
    assert set(counts) == set(TOKEN_CHALLENGES)
    assert max(counts.values()) - min(counts.values()) <= 6
    assert min(shares["omission"]) <= 0.2
    assert max(shares["omission"]) >= 0.5
    assert min(shares["substitution"]) <= 0.2
    assert max(shares["substitution"]) >= 0.4


def test_a_seed_gives_the_same_challenges() -> None:
    first, again, other = (
        torch.cat([x for x, *_ in generate_token_challenges([torch.tensor(texts())], range(40), each=3, seed=seed)])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inputs_of_one_length_keep_it() -> None:
    """Where nothing is padding, the network may take no other length."""
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randperm(40, generator=generator)[:7] for _ in range(40)])
    for inputs in (x, {"input_ids": x, "attention_mask": torch.ones_like(x)}):
        made = list(generate_token_challenges([inputs], range(40), each=2, seed=0))
        assert {kind for _, kinds, _ in made for kind in kinds} == {"transposition", "substitution"}


@pytest.mark.parametrize("sizes", [[2, 50, 7, 300], [6, 6, 2, 6, 6], [50, 3, 2, 3, 50], [2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("seed", range(4))
def test_columns_keep_their_vocabularies(sizes: list[int], seed: int) -> None:
    """An id that no input has at a place may be out of the range of a table that is asked for it there."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(60, len(sizes), generator=generator) * torch.tensor(sizes)).long()
    made = torch.cat([part for part, *_ in generate_token_challenges([x], range(60), each=3, seed=seed)])
    assert len(made) > 80
    assert (made <= x.amax(0)).all()
    assert (made >= 0).all()


@pytest.mark.parametrize("marked", [False, True])
def test_letters_of_a_small_alphabet_are_no_marks(marked: bool) -> None:
    """Every input holds all of them."""
    x = torch.randint(10, 14, (40, 60), generator=torch.Generator().manual_seed(0))
    if marked:
        x[:, 0], x[:, -1] = BEGIN, END
    given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    parts, kinds, _ = zip(*generate_token_challenges([given], range(40), each=3, seed=0), strict=True)
    made = torch.cat([part["input_ids"] for part in parts])
    assert set(itertools.chain(*kinds)) == {"transposition", "substitution"}
    assert len(made) == 120
    assert not marked or ((made[:, 0] == BEGIN) & (made[:, -1] == END) & (made == x[0, 0]).sum(1).eq(1)).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float64])
def test_a_mask_has_any_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor(texts())
    expected, found = (
        list(generate_token_challenges([{"attention_mask": mask, "input_ids": x}], range(40), each=1, seed=0))
        for mask in ((x != PAD).long(), (x != PAD).to(dtype))
    )
    for (wanted, *_), (made, *_) in zip(expected, found, strict=True):
        assert torch.equal(made["input_ids"], wanted["input_ids"])
        assert torch.equal(made["attention_mask"], wanted["attention_mask"].to(dtype))


BAD: dict[str, tuple[Any, str]] = {
    "complex": (torch.randn(40, 8, dtype=torch.complex64), "token ids have an integer dtype"),
    "one token": (torch.arange(40)[:, None], "clean must give token ids that can be left out, moved or replaced"),
    "added mask": (
        {"input_ids": torch.tensor(texts()), "attention_mask": -1e4 * (torch.tensor(texts()) == PAD)},
        "attention_mask must be 1 for tokens and 0 for padding.* it held -10000.0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_challenges_are_made_of_is_refused(case: str) -> None:
    given, message = BAD[case]
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    spectrum = Net(lambda net, x: net.layers(torch.view_as_real(x)), layers=layers)
    network = spectrum if case == "complex" else Reader()
    with pytest.raises(ValueError, match=message):
        TwoStageModel(network.eval(), blocks=["logits"]).fit([given])


def test_token_ids_are_integers_of_two_dimensions() -> None:
    whole = torch.ones(2, 3, dtype=torch.uint8)
    assert ids_of(whole) is whole
    assert ids_of({"input_ids": whole}) is whole
    others = (whole.bool(), whole.half(), whole[0], whole[None], {"pixels": whole}, {"input_ids": whole.tolist()})
    assert [ids_of(x) for x in others] == [None] * 6


def test_marks_stay_however_often_an_input_holds_them() -> None:
    x = torch.tensor(texts())
    x[::2, 5] = END
    for made, _, numbers in generate_token_challenges([x], range(40), each=3, seed=0):
        assert torch.equal((made == END).sum(1), (x[numbers] == END).sum(1))


def test_padding_may_look_like_the_end_of_a_text() -> None:
    x = torch.tensor(texts())
    given = {"input_ids": x.masked_fill(x == PAD, END), "attention_mask": (x != PAD).long()}
    for made, _, _ in generate_token_challenges([given], range(40), each=3, seed=0):
        mask = made["attention_mask"]
        assert (mask.diff() <= 0).all()
        assert (made["input_ids"].gather(1, mask.sum(1, keepdim=True) - 1) == END).all()


def test_a_mask_of_another_form_stays_as_it_is() -> None:
    x = torch.tensor(texts())
    mask = torch.rand(40, 1, 1, 24)
    (expected, *_), (found, *_) = (
        list(generate_token_challenges([given], range(40), each=1, seed=0))
        for given in ({"input_ids": x}, {"input_ids": x, "attention_mask": mask})
    )
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(found.inputs["attention_mask"], mask[found.sources])


def test_what_stands_beside_a_token_goes_with_it() -> None:
    x = torch.tensor(texts())
    given = {
        "input_ids": x, "attention_mask": (x != PAD).long(), "token_type_ids": 5 * x * (x != PAD),
        "position_ids": torch.arange(24).expand(40, 24), "label_of_source": torch.arange(40), "scale": 2.0,
    }  # fmt: skip
    for made, kinds, numbers in generate_token_challenges([given], range(40), each=3, seed=0):
        assert made["scale"] == 2.0
        assert made["label_of_source"].tolist() == numbers.tolist()
        assert torch.equal(made["position_ids"], given["position_ids"][: len(numbers)])
        kept = torch.tensor([kind != "substitution" for kind in kinds])
        expected = 5 * made["input_ids"] * (made["input_ids"] != PAD)
        assert torch.equal(made["token_type_ids"][kept], expected[kept])
        assert torch.equal(made["token_type_ids"][~kept], given["token_type_ids"][numbers][~kept])
    assert torch.equal(x, torch.tensor(texts()))


def test_what_cannot_change_gives_no_challenge() -> None:
    short = [[BEGIN, 7 + i % 2, END] for i in range(20)]
    x = torch.tensor([row + [PAD] * (14 - len(row)) for row in (*short, [], *texts(20, 14))])
    mask = (x != PAD).long()
    made = list(generate_token_challenges([{"input_ids": x, "attention_mask": mask}], range(41), each=3, seed=0))
    for part, _, numbers in made:
        assert (part["input_ids"] != x[numbers]).any(1).all()
        assert part["attention_mask"].any(1).all()
        assert (part["input_ids"][:, 0] == BEGIN).all()
    assert 20 not in {number for *_, numbers in made for number in numbers.tolist()}


class Reader(nn.Module):
    """Tells texts whose words are mostly below 100 from others; padding counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(210, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = input_ids != PAD if attention_mask is None else attention_mask > 0
        h = self.body(self.table(input_ids.long()).transpose(1, 2)).tanh() * mask[:, None]
        return self.head(h.sum(2) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("form", ["after", "after alone"])
def test_a_detector_of_texts_learns_from_their_challenges(form: str) -> None:
    model = Reader().eval()
    data: list[Any] = []
    for x in batches(form):
        with torch.no_grad():
            labels = model(ids(x)).argmax(1)
        labels[::5] = 1 - labels[::5]
        data.append((x, labels) if isinstance(x, Tensor) else x | {"labels": labels})
    two_stage = TwoStageModel(model).fit(data)
    report = two_stage.report()
    assert set(report.challenges) == set(TOKEN_CHALLENGES)
    made = sum(report.challenges.values())
    assert 200 < made <= 240
    # One pass for each clean input and each challenge: no attack, no other work of the network.
    assert report.passes == pytest.approx((1 + made / 80) * report.predicted)
    assert report.risk.startswith("from 80 clean inputs")
    assert f"and {made} of their challenges" in report.risk
    assert "challenges" in two_stage.explain(batches(form)[0]).evidence


def test_a_correction_learns_from_challenges_of_texts() -> None:
    model, x = Reader().eval(), torch.tensor(texts())
    data = [(x, torch.arange(40) % 2)]
    with pytest.warns(UserWarning, match="of 40 clean inputs right by the network"):
        two_stage = TwoStageModel(model, blocks=["logits"]).fit(data, correct=True)
    assert torch.isfinite(two_stage(x).probabilities).all()
