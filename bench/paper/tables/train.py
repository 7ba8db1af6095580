"""The networks that the quick tables share: both architectures, digits, and the ensemble's members."""

from __future__ import annotations

from bench.paper.subject import Subject
from bench.paper.table import Options, Table
from bench.paper.tables import baselines, ood


def subjects(options: Options) -> list[Subject]:
    """Each network once."""
    every = {subject.recipe: subject for subject in [*ood.subjects(options), *baselines.members(options)]}
    return list(every.values())


TABLE = Table("train", "Networks", ("cifar10", "mnist"), subjects, None, None)
