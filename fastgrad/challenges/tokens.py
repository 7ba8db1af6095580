"""Make challenges from token ids by leaving out, moving or replacing some (Wei and Zou, "EDA", EMNLP 2019).

The roles of ids are inferred from the sample. Padding is the id where the attention mask is 0 or, without one, the id
repeated at an end of the inputs. Ids that every input holds are the tokenizer's special tokens, here *marks*, and stay.
If these were most of the tokens, as with a small alphabet, marks are the ids that every input holds equally often.
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
from fastgrad.challenges.kinds import Challenges, kinds_for

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
#: Shares of an input's tokens that are altered, mild to severe. With components of activations alone, shares of .05 to
#: .3 gave .940 instead of .941, and the risk's AUROC of errors was .760 instead of .784.
SHARES = (0.1, 0.25, 0.5)
#: Largest number of other tokens that a moved token passes.
FAR = 3
Ids = NDArray[np.int64]
Places = NDArray[np.intp]


class Row(NamedTuple):
    """The tokens of one input without padding ``(L,)``, their columns, and the places of tokens that are not marks."""

    ids: Ids
    columns: Places
    movable: Places


#: Maps a row, chosen places in it, tokens of the sample and a generator to the places that are left, in their new
#: order, and the ids there.
Alter = Callable[[Row, Places, Ids, np.random.Generator], tuple[Places, Ids]]


def omission(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Leave out the chosen tokens and close the gaps."""
    places = np.delete(np.arange(len(row.ids)), chosen)
    return places, row.ids[places]


def transposition(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Move the chosen tokens past one to three others."""
    key = np.arange(len(row.ids), dtype=np.float64)
    key[chosen] += rng.choice([-1, 1], len(chosen)) * (rng.integers(1, FAR + 1, len(chosen)) + 0.5)
    places = np.arange(len(row.ids))
    places[row.movable] = row.movable[key[row.movable].argsort()]
    return places, row.ids[places]


def substitution(row: Row, chosen: Places, pool: Ids, rng: np.random.Generator) -> tuple[Places, Ids]:
    """Replace the chosen tokens by tokens of the whole sample, in proportion to their frequency there."""
    ids = row.ids.copy()
    ids[chosen] = rng.choice(pool, len(chosen))
    return np.arange(len(ids)), ids


#: Every kind of challenge of token ids by name; a kind is one row. Mean AUROC of other texts and changed news,
#: all-MiniLM-L6-v2 on AG News: all .981, without omission .975, without transposition .978, without substitution .979.
TOKEN_CHALLENGES: Mapping[str, Alter] = {
    "omission": omission, "transposition": transposition, "substitution": substitution,
}  # fmt: skip


def ids_of(x: Any) -> Tensor | None:
    """Return a batch's token ids ``(B, T)``: itself or its ``input_ids``, if they have an integer dtype; else None."""
    ids = x.get(IDS) if isinstance(x, Mapping) else x
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        return None
    return ids if ids.dim() == 2 else None


def generate_token_challenges(
    batches: Sequence[Any], chosen: Sequence[int], *, each: int, seed: int
) -> Iterator[Challenges]:
    """Yield ``each`` challenges of every chosen input, in batches of the clean inputs' form.

    Kinds and shares take turns over the inputs. A challenge that equals its clean input, such as one of a single token,
    is left out.

    Args:
        batches: All clean inputs, on the CPU, each with ids (see :func:`ids_of`).
        chosen: Numbers of the inputs to make challenges from, in order.
        each: Challenges per input.
        seed: Same seed, same challenges.

    Raises:
        ValueError: An attention mask holds negative values, like a mask that is added to attention scores.
    """
    corpus = Corpus(batches)
    # Without padding, all inputs must keep their length.
    names = [name for name in TOKEN_CHALLENGES if corpus.padding is not None or name != "omission"]
    turns = [(name, share) for name in names for share in SHARES]
    turns = [turns[place] for place in np.random.default_rng(seed).permutation(len(turns))]
    wanted = {number: kinds_for(turns, place, each) for place, number in enumerate(chosen)}
    first = 0
    for x in batches:
        size = batch_size(x)
        made: list[tuple[int, str, Places, Ids]] = []
        for number in filter(wanted.__contains__, range(first, first + size)):
            for again, (name, share) in enumerate(wanted[number]):
                # Random numbers of its own, so that batches of other sizes give the same challenges.
                places, ids = corpus.altered(number, name, share, np.random.default_rng((seed, number, again)))
                if not np.array_equal(ids, corpus.rows[number].ids):
                    made.append((number, name, places, ids))
        for start in range(0, len(made), size):
            part = made[start : start + size]
            numbers, names = [number for number, *_ in part], [name for _, name, *_ in part]
            yield Challenges(corpus.written(x, first, part), names, torch.tensor(numbers, device="cpu"))
        first += size


class Corpus:
    """The roles of tokens, inferred from the inputs of a sample.

    Attributes:
        rows: The inputs without padding.
        padding: The id of padding; None if there is none.
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
        # With a small alphabet, such as the letters of DNA, most inputs hold every id, but only marks equally often.
        if 2 * sum(count[token] for count in held for token in marks) > sum(map(len, real)):
            marks = {token for token in marks if len({count[token] for count in held}) == 1}
        movable = [np.flatnonzero(~np.isin(ids, list(marks))) for ids in real]
        self.rows = [Row(*parts) for parts in zip(real, columns, movable, strict=True)]
        self._pool = np.concatenate([row.ids[row.movable] for row in self.rows])
        # Columns of padding before the tokens, and after them.
        ends = [(own[0], len(ids) - 1 - own[-1]) for (ids, _), own in zip(inputs, columns, strict=True) if len(own)]
        self._before = sum(before - after for before, after in ends) > 0
        # A tensor may be a table whose columns have vocabularies of their own. An id above the largest one of a column
        # could be outside its vocabulary.
        self._table = any(isinstance(x, Tensor) for x in batches)
        self._largest = np.full(max(len(ids) for ids, _ in inputs), -1)
        for ids, _ in inputs:
            np.maximum(self._largest[: len(ids)], ids, out=self._largest[: len(ids)])

    def altered(self, number: int, name: str, share: float, rng: np.random.Generator) -> tuple[Places, Ids]:
        """Return an input's remaining places in their new order, and all its ids, with padding for tokens left out."""
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
        """Return which places of a row ``count`` tokens take: the last ones if padding comes before tokens."""
        return slice(len(row.ids) - count, None) if self._before else slice(count)

    def written(self, x: Any, first: int, made: Sequence[tuple[int, str, Places, Ids]]) -> Any:
        """Return a batch of altered inputs in the form of ``x``, whose first input has the number ``first``."""
        taken = take(x, torch.tensor([number - first for number, *_ in made], device="cpu"), batch_size(x))
        for name in (IDS, MASK, SEGMENTS):
            if (values := _part(taken, name)) is None:
                continue
            # A mask may be bfloat16, which NumPy lacks.
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
    """Return the ids of a batch, or its entry ``name`` if that has one value per id; else None."""
    ids = ids_of(x)
    value = x.get(name) if isinstance(x, Mapping) else ids if name == IDS else None
    return value if isinstance(value, Tensor) and ids is not None and value.shape == ids.shape else None


def _inputs(x: Any) -> Iterator[tuple[Ids, NDArray[Any] | None]]:
    """Yield the ids of every input of a batch, and its attention mask, if there is one."""
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
    """Return the ids that stand at an end at least twice in a row."""
    return np.array([ids[end] for end, beside in ((0, 1), (-1, -2)) if len(ids) > 1 and ids[end] == ids[beside]], int)


def _between(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark all places from the first marked one to the last."""
    return np.logical_or.accumulate(marked) & np.logical_or.accumulate(marked[::-1])[::-1]
