"""The path of a forward pass: the sequence of functions that Python calls, and on which parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastgrad._torch import without_modes
from fastgrad.ops.dispatch import bind_contextvar

_INDEXING = frozenset({"__getitem__", "__setitem__"})
_SEQUENCES = frozenset({tuple, list})
#: Functions whose integer arguments are dimensions, even if given by position.
_OF_DIMENSIONS = frozenset(
    name + end
    for end in ("", "_")
    for name in (
        "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "roll", "rot90", "select",
        "mean", "sum", "prod", "amax", "amin", "max", "min", "var", "std", "norm", "logsumexp", "any", "all", "argmax",
        "softmax", "log_softmax", "cumsum", "cumprod", "sort", "argsort", "cat", "stack", "unbind", "index_select",
        "gather", "flatten", "unsqueeze", "squeeze", "cummax", "cummin", "logcumsumexp", "nansum", "nanmean",
        "std_mean", "var_mean", "median", "nanmedian", "mode", "kthvalue", "topk", "diff", "trapezoid", "renorm",
        "chunk", "tensor_split", "cosine_similarity", "linalg_norm", "linalg_vector_norm",
    )
)  # fmt: skip


#: The steps in which functions are noted now.
_current: ContextVar[Steps | None] = ContextVar("fastgrad_steps", default=None)


class Steps(TorchFunctionMode):
    """Notes every function that returns a tensor: its name, its arguments that are dimensions, and the result's rank.

    It notes hooks of tensors, too, which may change gradients. Sizes are not noted: a plan that was tried on a few
    samples serves batches of any size. ``parameters`` maps the id of a tensor to the number of the parameter it is.
    """

    def __init__(self, parameters: dict[int, int]) -> None:
        super().__init__()
        self.parameters = parameters
        self._noted: list[Hashable] = []
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def note(self, *what: Hashable) -> None:
        """Note something else that belongs to the path."""
        self._noted.append(what)

    def path(self) -> int:
        """Return a hash that distinguishes one path from another."""
        return hash(tuple(self._noted))

    def settle(self, *, undo: bool) -> None:
        """Restore the data of parameters that ``weight.data = ...`` replaced, if ``undo``, and release it."""
        for parameter, data in reversed(self._replaced) if undo else ():
            parameter.data = data
        self._replaced.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call and note it."""
        name = func.__name__
        if name == "__set__" and id(args[0]) in self.parameters:
            self._replaced.append((args[0], args[0].data))
        result = func(*args, **kwargs) if kwargs else func(*args)
        if _current.get() is not self:
            return result
        if isinstance(result, Tensor):
            rank = result.dim()
        elif name == "_set_grad_enabled":
            # Functions inside note the mode. A checkpoint around the model sets it where it counts saved tensors.
            return result
        elif result is None or isinstance(result, (tuple, list, RemovableHandle)):
            rank = -1
        else:
            return result
        if name == "__get__":
            if rank < 0:  # a shape
                return result
            name = func.__self__.__name__
        noted, numbers = self._noted, self.parameters
        noted += (name, rank if torch.is_grad_enabled() else -2 - rank)
        values = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            if id(value) in numbers:
                noted.append(numbers[id(value)])
            elif type(value) in _SEQUENCES:
                noted += [numbers[id(one)] for one in value if id(one) in numbers]
        if name in _INDEXING:
            noted.append(_shape_of_index(args[1]))
        elif name in _OF_DIMENSIONS:
            noted.append(_whole_numbers(values[1:]))
        elif name == "einsum":
            noted.append(args[0])
        elif kwargs and "dim" in kwargs:
            noted.append(_whole_numbers([kwargs["dim"]]))
        return result


@contextlib.contextmanager
def noting(steps: Steps | None) -> Iterator[Steps | None]:
    """Note functions in ``steps`` alone, also within another pass; with None, note them nowhere."""
    with bind_contextvar(_current, steps), steps or contextlib.nullcontext():
        yield steps


def unnoted(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``hook`` such that its functions are not noted as steps of the model."""

    def run(*args: Any) -> Any:
        with without_modes():
            return hook(*args)

    return run


def in_place(name: str) -> bool:
    """Whether functions of this name write to their first argument."""
    augmented = name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
    return name == "__setitem__" or augmented or (name.endswith("_") and not name.endswith("__"))


def _whole_numbers(values: Any) -> Hashable:
    """Return the integers among arguments."""
    return tuple(
        _whole_numbers(v) if isinstance(v, (tuple, list)) else v for v in values if isinstance(v, (int, tuple, list))
    )


def _shape_of_index(index: Any) -> Hashable:
    """Return an index without its sizes."""
    if isinstance(index, tuple):
        return tuple(map(_shape_of_index, index))
    if isinstance(index, slice):
        return index.start is None, index.stop is None
    return None if index is None else type(index).__name__
