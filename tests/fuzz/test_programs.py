"""Random programs: every call of them is right, or refused for a reason that is named."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from tests.fuzz import steps
from tests.fuzz.generate import Program, Step, draw
from tests.fuzz.programs import shrunk, standalone, verdicts

PARTS = 10


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_calls_of_programs_are_right_or_refused_by_reason(part: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(part, 300, PARTS):
        for verdict in verdicts(draw(seed)):
            counts[verdict.partition(":")[0]] += 1
            assert not verdict.startswith("wrong"), standalone(draw(seed), verdict)
    # A generator of programs that nothing can be said of would find nothing.
    assert counts["right"] > counts["refused"] + counts["invalid"]


def kinds(inside: tuple[Step, ...]) -> set[str]:
    return {step.kind for step in inside} | {kind for step in inside for kind in kinds(step.inside)}


def test_three_hundred_programs_hold_every_row_of_the_tables() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert {kind for program in drawn for kind in kinds(program.steps)} == {*steps.LEAVES, *steps.WRAPPERS}
    assert {program.input for program in drawn} == {*steps.INPUTS}
    assert {program.head for program in drawn} == {*steps.HEADS}
    assert {program.output for program in drawn} == {*steps.OUTPUTS}
    assert {kind for program in drawn for kind, _, _ in program.ties} == {*steps.TIES}
    assert {line for program in drawn for line in program.calls} >= {*steps.ACTIONS.values()}


def test_what_is_wrong_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrad.gradients import recorder

    plain = recorder.grad_sqnorm

    def spoiled(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        return tuple(1.01 * norms for norms in plain(*args, **kwargs))

    monkeypatch.setattr("fastgrad.grad_sqnorm", spoiled)
    call = "session.record(B=3, T=2, mode='b', depth=2, big=False, mask=False)"
    program = Program((Step("tanh"), Step("block", (Step("linear"), Step("ReLU in place")))), (call,) * 2)
    verdict = next(iter(verdicts(program)))
    assert verdict.startswith("wrong: norms")
    small = shrunk(program, verdict)
    assert len(small.steps) <= 1
    assert len(small.calls) == 1
    namespace: dict[str, object] = {"__name__": "program"}
    with pytest.raises(Exception, match="norms are off"):
        exec(standalone(small, verdict), namespace)
    assert isinstance(namespace["Model"](), nn.Module)
