"""What random programs found, shrunk: each call is right now, or refused. Right is what each sample alone gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import everyday, steps
from tests.fuzz.generate import Program, Step
from tests.fuzz.programs import verdicts


def one(api: str, **options: object) -> str:
    """A call with options other than the usual ones."""
    usual = {"B": 1, "T": 1, "mode": "a", "depth": 1, "big": False, "mask": False}
    return f"session.{api}({', '.join(f'{k}={v!r}' for k, v in (usual | options).items())})"


def right(api: str, **options: object) -> tuple[str, str]:
    return one(api, **options), "right"


def refused(api: str, **options: object) -> tuple[str, str]:
    return one(api, **options), "refused"


def found(*parts: Step | str | tuple[str, str], **options: Any) -> tuple[Program, list[str]]:
    """A program of steps and calls, some of which are followed by what they give."""
    steps = tuple(part for part in parts if isinstance(part, Step))
    calls = [(part, None) if isinstance(part, str) else part for part in parts if not isinstance(part, Step)]
    program = Program(steps, tuple(call for call, _ in calls), **options)
    return program, [verdict for _, verdict in calls if verdict]


def around(kind: str, *inside: str) -> Step:
    return Step(kind, tuple(map(Step, inside)))


EVALUATION = "session.model.eval()"

#: What was found, shrunk, and what each call gives now.
FOUND: dict[str, tuple[Program, list[str]]] = {
    "rows in reverse, behind a norm of one number, one of whose gradients is rounding": found(around("reversed batch",
        "group norm"), right("record", B=2, big=True)),
    "rows sorted": found(around("sorted batch", "attention with a mask"), right("features", B=4, T=4)),
    "twice the rows": found(around("batch doubled", "LSTM"), right("record")),
    "the batch where another dimension should be": found(around("batch second", "GRU's last state"), right("clip"),
        refused("clip", B=3)),
    "folded, at two lengths": found(around("folded", "layer norm"), right("record"), right("record", B=2, T=2)),
    "positions of a folded batch": found(around("folded", "positions"), right("features")),
    "samples that interact, alone first": found(Step("samples mixed"), right("clip"), refused("clip", B=2),
        input="tokens"),
    "a mask as long as the batch": found(Step("attention with a mask"), refused("features", B=4, T=4, mask=True)),
    "an output without gradients": found(right("record"), right("clip"), head="functional", output="tuple"),
    "positions of one, beside a bare weight": found(Step("standardized weight"), Step("positions"), right("features")),
    "a frozen bias of attention": found(Step("bias of attention at one length"), "session.freeze()",
        right("record", T=2)),
    "a frozen parameter of a script": found(Step("script at one length"), "session.freeze()", right("features", T=2)),
    "several gradients through a function of one's own": found(Step("function of one's own"), around("batch doubled",
        "PReLU"), right("record", batched=True)),
    "a branch on the size of the batch": found(around("branch on batch size", "linear"), refused("features", B=4),
        right("record", B=3)),
    "a branch that the last sample opens": found(around("branch on input", "spectral norm"), refused("features", B=4,
        big=True)),
    "rows in reverse, of which some have no gradient": found(around("reversed batch", "experts of samples"),
        right("record", B=2), right("features", B=2)),
    "a checkpoint around a table by index": found(around("checkpoint", "table by index"), right("features"),
        right("features", B=3, T=2)),
    "a mask of one row, on a second path": found(around("branch on mode", "attention with a mask"), Step("linear"),
        right("record", mask=True), EVALUATION, right("record", mask=True)),
    "a norm of the first sample in a sorted batch, which changes nothing": found(Step("convolution 3d"),
        Step("RMS norm"), Step("sorted batch", (around("first sample", "RMS norm"),)), right("record"),
        right("features", B=4), head="none", seed=6245),
    "a layer called for each half of the batch": found(around("batch in halves", "linear"), right("record", B=5, T=2),
        right("features", B=4)),
    "a layer called for each sample": found(around("sample by sample", "bilinear"), right("record", B=3, T=2),
        right("clip", B=2), right("record"), right("features", T=2)),
    "a branch that changes a sample's numbers by 5e-6 alone": found(around("branch on input", "batch norm"),
        around("twice", "linear"), refused("record", B=2, big=True)),
    "a branch of a sample alone that counts in a buffer": found(Step("block", (around("branch on data",
        "buffer counted"),)), refused("clip", B=2), head="functional", seed=9401),
    "attention in evaluation mode, computed again without gradients": found(around("batch repeated", "scale",
        "attention"), EVALUATION, right("clip")),
    "a gate of another sample": found(around("batch second", "functional use", "experts of samples"), refused("record",
        B=3)),
    "a buffer that one argument has a call assign": found(around("branch on argument", "buffer assigned"),
        right("record", B=2, mode="b"), right("record", B=2), right("clip", B=2, mode="b"), right("clip", B=2)),
    "a buffer that counts samples, of which nothing else shows": found(around("batch doubled", "samples mixed"),
        around("sample by sample", "buffer counted"), right("record", B=2), right("clip", B=2), head="functional"),
    "a buffer that one argument has a call write in place": found(around("branch on argument", "spectral norm"),
        right("record", B=2, mode="b"), right("record", B=2), right("clip", B=2)),
    "an attribute that counts halves of the batch": found(Step("batch in halves", (around("batch doubled",
        "attribute counted"),)), right("clip", B=2)),
    "a checkpoint, frozen parameters, and another reason to run alone": found(Step("spectral norm"),
        around("checkpoint", "linear"), "session.freeze()", right("clip"), right("clip", B=2)),
    "a buffer that only a batch of four assigns, of which nothing else shows": found(around("branch on batch size",
        "buffer assigned"), around("batch doubled", "convolution 1d"), right("clip", B=4)),
    "a state that a copy in evaluation mode reads, in parts of the batch": found(Step("state"), right("clip", B=5),
        right("features", B=5), options="chunk=2"),
    "random numbers for each sample": found(Step("sample by sample", (around("branch at random", "unused"),)),
        right("record", B=2), right("record", B=2), right("clip", B=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    program, wanted = FOUND[name]
    given = list(verdicts(program))
    assert [verdict.partition(":")[0] for verdict in given] == wanted, given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", everyday.RIGHT)
def test_everyday_training_is_right(name: str) -> None:
    everyday.RIGHT[name]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", everyday.REFUSED)
def test_everyday_training_is_refused_by_name(name: str) -> None:
    call, message = everyday.REFUSED[name]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call()


#: Steps that are refused, and a word of the reason.
REFUSED = {"samples mixed": "independently", "embedding scaled by frequency": "scale_grad_by_freq"}


@pytest.mark.parametrize("kind", steps.LEAVES)
def test_each_kind_of_step(kind: str) -> None:
    calls = (EVALUATION, one("record", B=5, T=3), one("features", B=4, T=2), one("clip", B=2, T=3))
    for verdict in verdicts(Program((Step("linear"), Step(kind)), calls)):
        if kind in REFUSED:
            assert verdict.startswith("refused"), verdict
            assert REFUSED[kind] in verdict
        else:
            assert verdict == "right"
