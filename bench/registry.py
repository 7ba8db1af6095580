"""The registry of speed cases: a case is one function with a decorator.

    @case("rows", "rows B={0} N={1} D={2}", against="stored rows", names=("fastgrad eager", "stored rows"),
          tiny=[(3, 5, 8)], quick=[(64, 10, 512)], full=[...], gpu=[...])
    def rows(place: Place, B: int, N: int, D: int) -> Iterator[Implementation]:
        ...
        yield Implementation("stored rows", lambda: call, check, tolerance)

``pytest bench/micro`` collects every case at one size, checks each implementation against float64 and times it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = ("tiny", "quick", "full", "gpu")
#: Modules whose import registers cases.
MODULES = ("last_layer", "network", "private", "rows", "end_to_end", "growth")


class Place(NamedTuple):
    """Where a case runs: ``"cpu"`` or ``"cuda"``, and the seed of models and inputs."""

    device: str
    seed: int = 0


@dataclass(frozen=True)
class Implementation:
    """One way to do a case's task.

    Attributes:
        name: As the table says it.
        prepare: Returns the call that is measured; what it does first (wrapping a model, compiling) is not.
        check: Returns the relative error of the call's result.
        tolerance: Largest relative error; the case says why.
        graph: Whether the call can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    graph: bool = True


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Attributes:
        table: The results file.
        name: Task and sizes, e.g. ``contrasts B=256 N=1000 D=512 float32``.
        against: The implementation that ratios refer to.
        names: Implementations; some may be left out at a size.
        build: Makes inputs and implementations.
    """

    table: str
    name: str
    against: str
    names: tuple[str, ...]
    build: Callable[[Place], Iterable[Implementation]]

    def implementations(self, place: Place) -> dict[str, Implementation]:
        """Return the implementations by name; the inputs of the latest case are kept."""
        return _built(self, place)

    def ready(self, name: str, place: Place) -> tuple[Callable[[], Any], float]:
        """Return the call of an implementation and its error.

        Raises:
            LookupError: The case has no such implementation at this size.
            ValueError: The result is wrong.
        """
        found = self.implementations(place)
        if name not in found:
            raise LookupError(f"{self.name} has no {name}")
        call = found[name].prepare()
        error = float(found[name].check(call()))
        if not error <= found[name].tolerance:
            raise ValueError(
                f"{self.name}, {name}: the relative error must be at most {found[name].tolerance:.1e} to be timed; "
                f"it was {error:.1e}"
            )
        return call, error


@lru_cache(maxsize=1)
def _built(one: Case, place: Place) -> dict[str, Implementation]:
    return {item.name: item for item in one.build(place)}


Build = Callable[..., Iterator[Implementation]]
_CASES: dict[str, list[Case]] = {size: [] for size in SIZES}


def case(
    table: str, title: str, *, against: str, names: Sequence[str], **sizes: Iterable[tuple[Any, ...]]
) -> Callable[[Build], Build]:
    """Register a function as the cases of a table.

    Args:
        table: The results file.
        title: Format of a case's name, given the arguments.
        against: The implementation that ratios refer to.
        names: All implementations that the function may yield.
        **sizes: For each of `SIZES` the arguments of its cases.
    """

    def register(function: Build) -> Build:
        for size, shapes in sizes.items():
            for args in shapes:
                build = partial(_called, function, args)
                _CASES[size].append(Case(table, title.format(*args), against, tuple(names), build))
        return function

    return register


def _called(function: Build, args: tuple[Any, ...], place: Place) -> Iterator[Implementation]:
    return function(place, *args)


def cases(size: str) -> list[Case]:
    """Return all cases of a size."""
    for name in MODULES:
        importlib.import_module(f"bench.micro.{name}")
    return _CASES[size]


def forms(
    call: Callable[[str], Any], check: Callable[[Any], float], tolerance: float, place: Place
) -> Iterator[Implementation]:
    """Yield the eager form of an operator and, on a GPU, its kernels; ``call`` takes the operator's ``impl``."""
    for impl, name in {"triton": "fastgrad Triton", "eager": "fastgrad eager"}.items():
        if impl == "eager" or place.device == "cuda":
            yield Implementation(name, lambda impl=impl: lambda: call(impl), check, tolerance)  # type: ignore[misc]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest elementwise relative error; infinite where shapes differ or a value is not finite."""
    return _worst(value, reference, reference.double().abs())


def scaled_error(value: Tensor, reference: Tensor) -> float:
    """Largest error relative to the largest magnitude in the reference: for sums that may cancel."""
    return _worst(value, reference, reference.double().abs().max())


def _worst(value: Tensor, reference: Tensor, scale: Tensor) -> float:
    if tuple(value.shape) != tuple(reference.shape):
        return float("inf")
    value = value.detach().to(reference.device).double()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    tiny = torch.finfo(torch.float64).tiny
    return float(((value - reference.double()).abs() / scale.clamp_min(tiny)).max())
