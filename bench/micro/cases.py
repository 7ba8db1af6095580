"""Every speed case by its size; the imports register them."""

from __future__ import annotations

from bench.micro import contrasts, gram, network, rows  # noqa: F401
from bench.registry import REGISTERED, Case


def cases(size: str) -> list[Case]:
    return REGISTERED[size]
