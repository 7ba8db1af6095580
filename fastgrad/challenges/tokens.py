"""Challenges made from token ids: some left out, moved, or replaced (Wei and Zou, "EDA", EMNLP 2019).

The sample tells what its ids are. What stands where the attention mask is 0, or else repeated at an end of the inputs,
is padding. Ids that every input holds are a tokenizer's marks, and stay. Where these would be most of the tokens, as
the letters of a small alphabet, only those are marks that every input holds equally often.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.batches import batch_size, take
from fastgrad.challenges.generate import of_turn

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
#: Shares of an input's tokens that are altered, mild to severe. By components of activations alone, .05 to .3: .940
#: for .941, and the risk's AUROC of errors .760 for .784.
SHARES = (0.1, 0.25, 0.5)
#: Other tokens that a moved one passes at most.
FAR = 3
Ids = NDArray[np.int64]
Places = NDArray[np.intp]


class Row(NamedTuple):
    """The tokens of one input without padding ``(L,)``, the columns where they stand, and the places of no marks."""

    ids: Ids
    columns: Places
    movable: Places


#: From a row, places of it, tokens of the sample and a generator to the places that are left, in their new order, and
#: the ids that stand there.
Alter = Callable[[Row, Places, Ids, np.random.Generator], tuple[Places, Ids]]


def omission(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Some tokens left out; the others close up."""
    places = np.delete(np.arange(len(row.ids)), chosen)
    return places, row.ids[places]


def transposition(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Some tokens moved past one to three others."""
    key = np.arange(len(row.ids), dtype=np.float64)
    key[chosen] += rng.choice([-1, 1], len(chosen)) * (rng.integers(1, FAR + 1, len(chosen)) + 0.5)
    places = np.arange(len(row.ids))
    places[row.movable] = row.movable[key[row.movable].argsort()]
    return places, row.ids[places]


def substitution(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Some tokens replaced by those of the whole sample, as frequent as there."""
    ids = row.ids.copy()
    ids[chosen] = rng.choice(pool, len(chosen))
    return np.arange(len(ids)), ids


#: Every kind of challenge of token ids by name; a kind is one row. Mean AUROC of other texts and changed news,
#: all-MiniLM-L6-v2 on AG News: all .981, without omission .975, without transposition .978, without substitution .979.
TOKEN_CHALLENGES: Mapping[str, Alter] = {
    "omission": omission, "transposition": transposition, "substitution": substitution,
}  # fmt: skip


def ids_of(x: Any) -> Tensor | None:
    """Token ids ``(B, T)`` of a batch: itself or its ``input_ids``, of an integer dtype; None where it has none."""
    ids = x.get(IDS) if isinstance(x, Mapping) else x
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        return None
    return ids if ids.dim() == 2 else None


def iter_token_challenges(
    batches: Sequence[Any], chosen: Sequence[int], *, each: int, seed: int
) -> Iterator[tuple[Any, list[str], list[int]]]:
    """Yield ``each`` challenges of every chosen input, in batches of the clean inputs' form, with kinds and sources.

    Kinds and shares take turns over the inputs. What would stay as it is, an input of one token for example, is left
    out.

    Args:
        batches: All clean inputs, on the CPU, each with ids (see :func:`ids_of`).
        chosen: Numbers of the inputs that challenges are made of, in order.
        each: Challenges of one input.
        seed: Same seed, same challenges.

    Raises:
        ValueError: An attention mask holds negative values, as one that is added to scores.
    """
    corpus, rng = Corpus(batches), np.random.default_rng(seed)
    # Where nothing is padding, all inputs must stay as long as they are.
    names = [name for name in TOKEN_CHALLENGES if corpus.padding is not None or name != "omission"]
    turns = [(name, share) for name in names for share in SHARES]
    turns = [turns[place] for place in rng.permutation(len(turns))]
    wanted = {number: of_turn(turns, place, each) for place, number in enumerate(chosen)}
    first = 0
    for x in batches:
        own = range(first, first + batch_size(x))
        for again in range(each):
            made: list[tuple[int, str, Places, Ids]] = []
            for number in own:
                if number in wanted:
                    name, share = wanted[number][again]
                    places, ids = corpus.altered(number, name, share, rng)
                    if not np.array_equal(ids, corpus.rows[number].ids):
                        made.append((number, name, places, ids))
            if made:
                sources = [number for number, *_ in made]
                yield corpus.written(x, first, made), [name for _, name, *_ in made], sources
        first += len(own)


class Corpus:
    """What the inputs of a sample tell of their tokens.

    Attributes:
        rows: The inputs without padding.
        padding: Its id; None where there is none.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        inputs = list(itertools.chain.from_iterable(map(_inputs, batches)))
        hidden = Counter[int]()
        for ids, mask in inputs:
            hidden.update((_repeated(ids) if mask is None else ids[mask == 0]).tolist())
        self.padding = hidden.most_common(1)[0][0] if hidden else None
        columns = [np.flatnonzero(_between(ids != self.padding) if mask is None else mask) for ids, mask in inputs]
        real = [ids[own] for (ids, _), own in zip(inputs, columns, strict=True)]
        held = [Counter(ids.tolist()) for ids in real if len(ids)]
        marks = set[int]().union(*held[:1]).intersection(*held)
        # Of a small alphabet, such as the letters of DNA, most inputs hold every id, and marks are held equally often.
        if 2 * sum(count[token] for count in held for token in marks) > sum(map(len, real)):
            marks = {token for token in marks if len({count[token] for count in held}) == 1}
        movable = [np.flatnonzero(~np.isin(ids, list(marks))) for ids in real]
        self.rows = [Row(*parts) for parts in zip(real, columns, movable, strict=True)]
        self._pool = np.concatenate([row.ids[row.movable] for row in self.rows])
        # Columns of padding before the tokens, and after them.
        ends = [(own[0], len(ids) - 1 - own[-1]) for (ids, _), own in zip(inputs, columns, strict=True) if len(own)]
        self._before = sum(before - after for before, after in ends) > 0
        # A tensor may be a table, whose columns have vocabularies of their own. A larger id than all of a column could
        # be beyond its vocabulary.
        self._table = any(isinstance(x, Tensor) for x in batches)
        self._largest = np.full(max(len(ids) for ids, _ in inputs), -1)
        for ids, _ in inputs:
            np.maximum(self._largest[: len(ids)], ids, out=self._largest[: len(ids)])

    def altered(self, number: int, name: str, share: float, rng: np.random.Generator) -> tuple[Places, Ids]:
        """What is left of the places of an input, in their new order, and all its ids, padding for what is gone."""
        row = self.rows[number]
        count = min(math.ceil(share * len(row.movable)), len(row.ids) - 1)
        chosen = rng.choice(row.movable, max(0, count), replace=False)
        places, left = TOKEN_CHALLENGES[name](row, chosen, self._pool, rng)
        ids = np.full_like(row.ids, self.padding or 0)
        ids[self._kept(row, len(left))] = left
        if self._table:
            ids = np.where(ids > self._largest[row.columns], row.ids, ids)
        return places, ids

    def _kept(self, row: Row, count: int) -> slice:
        """The tokens of a row whose columns ``count`` tokens take."""
        return slice(len(row.ids) - count, None) if self._before else slice(count)

    def written(self, x: Any, first: int, made: Sequence[tuple[int, str, Places, Ids]]) -> Any:
        """A batch of altered inputs in the form of ``x``, whose first input has the number ``first``."""
        taken = take(x, torch.tensor([number - first for number, *_ in made], device="cpu"), batch_size(x))
        for name in (IDS, MASK, SEGMENTS):
            if (values := _part(taken, name)) is None:
                continue
            # NumPy has no bfloat16, in which a mask may be.
            lines = (values.double() if name == MASK else values).numpy()
            for line, (number, _, places, ids) in zip(lines, made, strict=True):
                row = self.rows[number]
                if name != IDS:
                    beside = line[row.columns]
                    ids = np.zeros_like(beside)
                    ids[self._kept(row, len(places))] = beside[places]
                line[row.columns] = ids
            values.copy_(torch.from_numpy(lines))
        return taken


def _part(x: Any, name: str) -> Tensor | None:
    """The ids of a batch, or what it has beside each of them under a name."""
    ids = ids_of(x)
    value = x.get(name) if isinstance(x, Mapping) else ids if name == IDS else None
    return value if isinstance(value, Tensor) and ids is not None and value.shape == ids.shape else None


def _inputs(x: Any) -> Iterator[tuple[Ids, NDArray[Any] | None]]:
    """The ids of every input of a batch, and its attention mask, if there is one."""
    ids, mask = _part(x, IDS), _part(x, MASK)
    assert ids is not None  # asked for
    seen = None if mask is None else mask.double().numpy()
    if seen is not None and (seen < 0).any():
        raise ValueError(
            f"{MASK} must be 1 for tokens and 0 for padding, for challenges to be made from token ids; it held "
            f"{seen.min()}. Make other masks in a module around the network, or give challenges=None"
        )
    yield from zip(ids.numpy().astype(np.int64), itertools.repeat(None) if seen is None else seen, strict=False)


def _repeated(ids: Ids) -> Ids:
    """What stands at an end at least twice."""
    return np.array([ids[end] for end, beside in ((0, 1), (-1, -2)) if len(ids) > 1 and ids[end] == ids[beside]], int)


def _between(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Places from the first marked one to the last."""
    return np.logical_or.accumulate(marked) & np.logical_or.accumulate(marked[::-1])[::-1]
