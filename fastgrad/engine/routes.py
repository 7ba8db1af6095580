"""Reports of how each parameter's norms were computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastgrad.engine.recorded import Alone, Recorded
from fastgrad.layers.call import Call


@dataclass(frozen=True)
class Route:
    """How one parameter's norms were computed (`GradientFeatures.report`).

    Attributes:
        parameter: Its name.
        route: "rule" (a formula of the function that uses it), "sum" (of its uses' gradients), "copies" (a copy for
            each sample), "alone" (samples ran one by one) or "unused".
        reason: Which functions, or why.
    """

    parameter: str
    route: str
    reason: str


def routes_of(recorded: Recorded, names: Mapping[int, str]) -> list[Route]:
    """Return the route of each named parameter in a recorded call."""
    formulas: dict[int, list[str]] = {}
    alone = False
    for _, part in recorded.parts:
        alone |= isinstance(part, Alone)
        if isinstance(part, Call):
            own: dict[int, list[str]] = {}
            for use in part.uses:
                for key in use.keys:
                    own.setdefault(key, []).append(use.formula.name)
            # Another group of samples may use it more often.
            for key, kinds in own.items():
                if len(kinds) > len(formulas.get(key, [])):
                    formulas[key] = kinds
    return [
        Route(name, *_route(formulas.get(key, []), recorded.alone_reason if alone else ""))
        for key, name in names.items()
    ]


def _route(kinds: list[str], alone: str) -> tuple[str, str]:
    if alone:
        return "alone", f"the samples ran one by one, which is slower: {alone}"
    if not kinds:
        return "unused", "no function used it"
    if len(kinds) > 1:
        return "sum", f"used {len(kinds)} times: {', '.join(dict.fromkeys(kinds))}"
    if kinds == ["copies"]:
        return "copies", "no rule serves the function that uses it, so each sample has a copy"
    return "rule", kinds[0]
