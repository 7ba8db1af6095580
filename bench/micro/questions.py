"""The questions by name, each with its ``cases(size, device, seed)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from bench.harness.case import Case
from bench.micro import end_to_end, rows
from bench.micro.last_layer import cases as last_layer
from bench.micro.network import cases as network
from bench.micro.private import cases as private

QUESTIONS: Mapping[str, Callable[[str, str, int], Iterator[Case]]] = {
    "last-layer": last_layer.cases,
    "network": network.cases,
    "compiled": network.compiled_cases,
    "private": private.cases,
    "rows": rows.cases,
    "end-to-end": end_to_end.cases,
}
