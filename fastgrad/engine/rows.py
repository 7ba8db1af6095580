"""Whose rows a tensor holds: tensors whose rows were reordered, or gathered by an index computed from the batch.

A mixture of experts hands each expert the tokens that chose it, of whichever samples, by an index or by a product with
zeros and ones; a model may sort its samples by length. How many rows such a tensor has, and in what order, says nothing
about where a sample lies in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgrad._torch import pytree

#: By name without underscores, functions whose first argument takes up rows and keeps its own.
_SCATTERING = frozenset(
    {
        "setitem", "index_add", "index_put", "index_copy", "index_reduce", "masked_scatter",
        "scatter", "scatter_add", "scatter_reduce",
    }
)  # fmt: skip
#: Those that gather along a dimension by an index.
_GATHERING = frozenset({"index_select", "gather", "take_along_dim"})
#: Those that reorder along dimensions, with the place of these among their arguments.
_REORDERING = {"flip": 1, "flipud": 1, "roll": 2}
#: Those that draw.
_DRAWING = frozenset({"randperm", "randint", "rand", "randn", "multinomial", "bernoulli"})


class Rows:
    """What is known of the tensors of one forward pass on ``inputs``."""

    def __init__(self, inputs: Any) -> None:
        # Held, so that no other tensor gets the id of one.
        self._held: list[Tensor] = []
        self._computed: set[int] = set()
        self._gathered: set[int] = set()
        self._add(self._computed, inputs)

    @property
    def gathers(self) -> bool:
        """Whether rows were gathered or reordered at all."""
        return bool(self._gathered)

    def gathered(self, tree: Any) -> bool:
        """Whether a tensor in ``tree`` holds gathered rows."""
        return any(id(leaf) in self._gathered for leaf in pytree.tree_leaves(tree))

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take up one call of a function."""
        name = getattr(function, "__name__", "").strip("_")
        computed = name in _DRAWING or self._computed_in((args, kwargs))
        if not computed:
            return
        # What is written to in place comes from what is written.
        first = args[0] if args else None
        scatters = name in _SCATTERING
        written = (result, first) if name == "setitem" or getattr(function, "__name__", "").endswith("_") else result
        self._add(self._computed, written)
        if self.gathered(first if scatters else (args, kwargs)) or self._gathers(name, args, kwargs):
            self._add(self._gathered, result)

    def _gathers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name == "einsum":
            return self._sums_over_rows(*args)
        if not args or id(args[0]) not in self._computed:
            return False
        if name == "masked_select":
            return True
        if name == "getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return self._computed_in(next((i for i in index if i is not None), ()))
        if name in ("matmul", "mm") and isinstance(args[1], Tensor):
            return args[1].dim() == 2 and self._computed_in(args[1])
        if name in _REORDERING:
            told = pytree.tree_leaves((args[_REORDERING[name] :], kwargs.get("dims")))
            return name == "flipud" or any(dim in (0, -args[0].dim()) for dim in told)
        if name in _GATHERING:
            given = {"dim": args[1] if len(args) > 1 else None} | kwargs
            rest = [*args[1:], *kwargs.values()]
            return given["dim"] in (0, -args[0].dim()) and self._computed_in(rest)
        return False

    def _sums_over_rows(self, equation: object, *operands: Any) -> bool:
        """Whether rows of several tensors computed from the batch are multiplied and added up."""
        if not isinstance(equation, str):
            return False
        terms, _, kept = equation.replace(" ", "").partition("->")
        tensors = pytree.tree_leaves(operands)
        first = [term[0] for term, t in zip(terms.split(","), tensors, strict=True) if term and id(t) in self._computed]
        return any(first.count(letter) > 1 and letter not in kept for letter in first)

    def _computed_in(self, tree: Any) -> bool:
        return any(id(leaf) in self._computed for leaf in pytree.tree_leaves(tree))

    def _add(self, known: set[int], tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._held.append(leaf)
                known.add(id(leaf))
