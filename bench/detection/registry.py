"""The entries of the tables: networks, methods and cases, each one function with a decorator.

    @method("energy", 2020, "Liu et al., NeurIPS")
    def energy(fit: Fit) -> Score:
        return lambda seen: -seen.logits.logsumexp(1)

A score is higher for less reliable answers. An entry that cannot run raises `NotRun`, or lacks a package or a file: its
rows say so, and its group has no mean.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bench.detection.experiment import CASES, Case, Experiment, Fit, Options, Seen

Score = Callable[[Seen], Tensor]
Any_ = TypeVar("Any_", bound=Callable[..., object])


class Protocol(enum.Enum):
    """The data that a method was fitted on."""

    CLEAN = "clean data only"
    GENERATED = "with generated challenges"
    LABELLED = "with labelled challenges"


class Method(NamedTuple):
    """A detector, with year and source; a slow one takes several passes, and quick mode may leave it out."""

    name: str
    year: int
    paper: str
    protocol: Protocol
    fit: Callable[[Fit], Score]
    slow: bool = False


class Network(NamedTuple):
    """A classifier with its data; ``tuned`` if choices of this package were compared on it."""

    title: str
    tuned: bool
    make: Callable[[Options, int], Experiment]


METHODS: dict[str, Method] = {}
NETWORKS: dict[str, Network] = {}


def _registering(entries: dict[str, Any], name: str, entry: Callable[[Any_], object]) -> Callable[[Any_], Any_]:
    def register(function: Any_) -> Any_:
        entries[name] = entry(function)
        return function

    return register


def method(
    name: str, year: int, paper: str, protocol: Protocol = Protocol.CLEAN, *, slow: bool = False
) -> Callable[[Any_], Any_]:
    """Register a function that fits a method on a `Fit` and returns its score."""
    return _registering(METHODS, name, lambda fit: Method(name, year, paper, protocol, fit, slow))


def case(name: str, group: str, kinds: tuple[str, ...]) -> Callable[[Any_], Any_]:
    """Register a function that makes inputs from ``(experiment, part, count)``."""
    return _registering(CASES, name, lambda make: Case(group, kinds, make))


def network(name: str, title: str, *, tuned: bool = False) -> Callable[[Any_], Any_]:
    """Register a function that makes a `Experiment` from ``(options, draw)``."""
    return _registering(NETWORKS, name, lambda make: Network(title, tuned, make))
