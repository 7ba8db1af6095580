"""The inputs of a model's call: which of them carry the batch, and what each sample gets."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.batches import batch_size, same_class
from fastgrad.checks import holds_values
from fastgrad.engine.outputs import is_object

#: What says which inputs carry the batch: 0 for all with a row for each sample, or for some inputs, by their names or
#: positions, the dimension of the batch, or None if samples share them.
BatchDims = int | Mapping[str | int, int | None] | None


class CallInputs:
    """The inputs of one call of ``forward``.

    By default each tensor carries the batch that has as many rows as the first one; ValueError for one of these that
    has as many rows as columns, because it may be a mask of positions, unless ``batch_dims`` says what it is.
    """

    def __init__(self, forward: Any, args: Any, kwargs: Any, batch_dims: BatchDims = None) -> None:
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.dims: list[int | None] = [0 if isinstance(x, Tensor) and x.dim() else None for x in self.leaves]
        self._given = [False] * len(self.leaves)
        self._call = forward, args, kwargs
        if isinstance(batch_dims, Mapping):
            self._apply(batch_dims)
        first = next((at for at, dim in enumerate(self.dims) if dim is not None), None)
        if first is None:
            batch_size(args, kwargs)  # which says what the inputs held
            raise ValueError("batch_dims must leave an input that carries the batch; it named None for all")
        holds_values("inputs with a row for each sample", self.leaves[first])
        self.samples: int = self.leaves[first].shape[self.dims[first]]
        for at, (x, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if dim is None:
                continue
            if not self._given[at] and x.shape[0] != self.samples:
                self.dims[at] = None
            elif x.shape[dim] != self.samples:
                raise ValueError(
                    f"batch_dims must name dimensions of one size; that of {self._names(at)} was {x.shape[dim]}, that "
                    f"of {self._names(first)} {self.samples}"
                )
            told = self._given[at] or at == first or batch_dims == 0 or x is self.leaves[first]
            if self.dims[at] is not None and not told and self.samples > 1 and self.samples in x.shape[1:]:
                name = self._names(at)
                raise ValueError(
                    f"inputs must not be square in the batch; {name} was {tuple(x.shape)} for {self.samples} samples, "
                    "so that it may hold a row for each sample or be the same for all. Say which: "
                    f"batch_dims={{{name}: 0}} or batch_dims={{{name}: None}}, or batch_dims=0 where all inputs carry "
                    "the batch"
                )
        #: Whether all inputs that carry the batch have one dimension.
        self.lines = all(x.dim() == 1 for x, dim in zip(self.leaves, self.dims, strict=True) if dim is not None)
        #: Numbers of tensors in lists and tuples among the inputs.
        self.lists = {len(x) for x in (*args, *kwargs.values()) if type(x) in (list, tuple)}
        #: Inputs that may hold tensors in attributes, such as caches.
        self.objects = [x for x in self.leaves if is_object(x)]

    def _keys(self) -> list[set[str | int]]:
        """Return for each leaf the names and positions of the input that holds it."""
        forward, args, kwargs = self._call
        try:
            known = [
                p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
        except (TypeError, ValueError):
            known = []
        keys: list[set[str | int]] = []
        for at, value in enumerate(args):
            keys += [{at, known[at]} if at < len(known) else {at}] * len(pytree.tree_leaves(value))
        for name, value in kwargs.items():
            keys += [{name}] * len(pytree.tree_leaves(value))
        return keys

    def _names(self, at: int) -> str:
        """Return the name of the input that holds a leaf, as a literal, or its position."""
        own = self._keys()[at]
        return repr(next((key for key in own if isinstance(key, str)), next(iter(own))))

    def _apply(self, batch_dims: Mapping[str | int, int | None]) -> None:
        keys = self._keys()
        for key, dim in batch_dims.items():
            for at, own in enumerate(keys):
                x = self.leaves[at]
                if key in own and isinstance(x, Tensor):
                    if dim is not None and not (type(dim) is int and 0 <= dim < x.dim()):
                        raise ValueError(
                            f"batch_dims must name dimensions of the inputs, from 0, or None; that of {key!r}, of "
                            f"shape {tuple(x.shape)}, was {dim!r}"
                        )
                    self.dims[at], self._given[at] = dim, True

    def key(self) -> Any:
        """Return a key for the structure of the inputs: dimensions, which carry the batch, and flags and words."""
        leaves = tuple(
            (x.dim(), x.dtype, dim, x.requires_grad)
            if isinstance(x, Tensor)
            else (x if isinstance(x, (bool, str)) else type(x))
            for x, dim in zip(self.leaves, self.dims, strict=True)
        )
        return self.spec, leaves

    def call_of(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that have these leaves; containers that are leaves are copies."""
        own = [copy.copy(x) if isinstance(x, (set, list, dict)) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(own, self.spec)
        return args, kwargs

    def copies(self) -> list[Any]:
        """Return the leaves, with copies of the tensors, for a call that may write to them."""
        return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in self.leaves]

    def doubled(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves with each sample twice."""
        return [
            x if dim is None else same_class(torch.cat([x, x], dim), x)
            for x, dim in zip(leaves, self.dims, strict=True)
        ]

    def rows(self, index: Tensor | None) -> list[Any]:
        """Return the leaves with these samples; all for None. A tensor that is given twice stays one object.

        Attention checks whether query and key are identical.
        """
        if index is None:
            return self.leaves
        cut: dict[int, Any] = {}
        for x, dim in zip(self.leaves, self.dims, strict=True):
            if dim is not None and id(x) not in cut:
                # One sample alone is a view, so that a model which writes to its input writes to the caller's.
                rows = x.narrow(dim, int(index), 1) if len(index) == 1 else x.index_select(dim, index.to(x.device))
                cut[id(x)] = same_class(rows, x)
        return [x if dim is None else cut[id(x)] for x, dim in zip(self.leaves, self.dims, strict=True)]

    def carriers(self, leaves: Sequence[Any]) -> dict[int, tuple[Tensor, int]]:
        """Return the tensors that carry the batch among such leaves, by id, with their dimensions."""
        return {id(x): (x, dim) for x, dim in zip(leaves, self.dims, strict=True) if dim is not None}

    def behind(self) -> list[Any]:
        """Return the graph nodes that computed the inputs."""
        given = [x for x in self.leaves if isinstance(x, Tensor) and x.requires_grad]
        with torch.enable_grad():
            return [x.view_as(x).grad_fn if x.grad_fn is None else x.grad_fn for x in given]
