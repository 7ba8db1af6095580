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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from bench.detection.subject import Fit, Seen, Subject

Score = Callable[["Seen"], Tensor]
Any_ = TypeVar("Any_", bound=Callable[..., object])


class NotRun(Exception):  # noqa: N818
    """Why a method or a case has no result for a network."""


class Protocol(enum.Enum):
    """The data that a method was fitted on."""

    CLEAN = "clean data only"
    GENERATED = "with generated challenges"
    LABELLED = "with labelled challenges"


class Shown(NamedTuple):
    """Images of a case ``(n, C, H, W)`` in [0, 1]; for an attack only those that mislead the network.

    ``source`` ``(n,)`` are the places, in their part, of the clean images they are made from; -1 for other sets.
    """

    images: Tensor
    source: Tensor


class Method(NamedTuple):
    """A detector, with year and source; a slow one takes several passes, and quick mode may leave it out."""

    name: str
    year: int
    paper: str
    protocol: Protocol
    fit: Callable[[Fit], Score]
    slow: bool = False


class Case(NamedTuple):
    """A kind of unusual inputs: the group whose mean it enters, and the kinds of data that have it."""

    group: str
    kinds: tuple[str, ...]
    make: Callable[[Subject, str, int], Shown]


class Network(NamedTuple):
    """A classifier with its data; ``tuned`` if choices of this package were compared on it."""

    title: str
    tuned: bool
    make: Callable[[Options, int], Subject]


class Options(NamedTuple):
    """A command's options: folders of data and cache, small sets, samples of the data or seeds of networks."""

    data: Path
    cache: Path
    quick: bool = False
    draws: int = 1


#: Kinds of data: photographs, of which a class has one or two; images of 32 pixels; texts; files.
PHOTOGRAPHS, SMALL, TEXTS, FILES = "photographs", "small images", "texts", "files"
IMAGES = (PHOTOGRAPHS, SMALL)
METHODS: dict[str, Method] = {}
CASES: dict[str, Case] = {}
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
    """Register a function that makes inputs from ``(subject, part, count)``."""
    return _registering(CASES, name, lambda make: Case(group, kinds, make))


def network(name: str, title: str, *, tuned: bool = False) -> Callable[[Any_], Any_]:
    """Register a function that makes a `Subject` from ``(options, draw)``."""
    return _registering(NETWORKS, name, lambda make: Network(title, tuned, make))
