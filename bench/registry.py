"""The registry of speed cases: a case is one function with a decorator.

    @case("rows", "rows B={0} N={1} D={2}", against="stored rows", names=("fastgrad eager", "stored rows"),
          tiny=[(3, 5, 8)], quick=[(64, 10, 512)], full=[...], gpu=[...])
    def rows(B: int, N: int, D: int, device: str) -> Iterator[Implementation]:
        yield Implementation("stored rows", lambda: call, check, tolerance)

``pytest bench/micro`` collects every case at one size, checks each implementation against float64 and times it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = ("tiny", "quick", "full", "gpu")
#: Seed of models and inputs.
SEED = 0
Build = Callable[..., Iterable["Implementation"]]


class Implementation(NamedTuple):
    """One way to do a case's task.

    Attributes:
        name: Name in the table.
        prepare: Returns the call that is measured; its own work (wrapping a model, compiling) is not measured.
        check: Returns the relative error of the call's result, at most ``tolerance``; the case says why.
        graph: Whether the call can be captured in a CUDA graph.
        covered: Returns the share of the parameters' numbers that the call's result is of.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    graph: bool = True
    covered: Callable[[Any], float] = lambda result: 1.0


@dataclass(frozen=True)
class Case:
    """One task at one size: ``build`` makes inputs and implementations on a device, ``"cpu"`` or ``"cuda"``."""

    table: str
    name: str
    against: str
    names: tuple[str, ...]
    build: Build

    @lru_cache(maxsize=1)  # noqa: B019 - the inputs of one case, the latest
    def implementations(self, device: str) -> dict[str, Implementation]:
        return {item.name: item for item in self.build(device)}

    def ready(self, name: str, device: str) -> Callable[[], Any]:
        """Return the call of an implementation; a ValueError if its result is wrong."""
        return self.checked(name, device)[0]

    def checked(self, name: str, device: str) -> tuple[Callable[[], Any], float, float]:
        """Return the same, the relative error of its result, and the share of the network that it covers."""
        found = self.implementations(device)[name]
        call = found.prepare()
        result = call()
        error, allowed = float(found.check(result)), found.tolerance
        if not error <= allowed:
            message = f"the relative error must be at most {allowed:.1e} to be timed; it was {error:.1e}"
            raise ValueError(f"{self.name}, {name}: {message}")
        return call, error, found.covered(result)


#: The cases of the files that were imported; `bench.micro.cases` imports all.
REGISTERED: dict[str, list[Case]] = {size: [] for size in SIZES}


def case(
    table: str, title: str, *, against: str, names: Sequence[str], **sizes: Iterable[tuple[Any, ...]]
) -> Callable[[Build], Build]:
    """Register a function as the cases of a table.

    Args:
        table: The results file.
        title: Format of a case's name, given the arguments: ``contrasts B=256 N=1000 D=512 float32``.
        against: The implementation that ratios refer to.
        names: All implementations that the function may yield; some may be left out at a size.
        **sizes: For each of `SIZES` the arguments of its cases.
    """

    def register(function: Build) -> Build:
        for size, shapes in sizes.items():
            for args in shapes:
                REGISTERED[size].append(
                    Case(table, title.format(*args), against, tuple(names), partial(function, *args))
                )
        return function

    return register


def relative_error(value: Tensor, reference: Tensor, scaled: bool = False) -> float:
    """Return the largest relative error; infinite if shapes differ or a value is not finite.

    It is relative to each element or, ``scaled``, to the largest magnitude in the reference: for sums that may cancel.
    """
    if value.shape != reference.shape or not bool(value.isfinite().all()):
        return float("inf")
    exact = reference.double()
    scale = exact.abs().max() if scaled else exact.abs()
    return float(((value.detach().double() - exact).abs() / scale.clamp_min(torch.finfo(exact.dtype).tiny)).max())


scaled_error = partial(relative_error, scaled=True)
