"""What random programs found, shrunk: each call is right now, or refused."""

from __future__ import annotations

import pytest

from tests.fuzz import steps
from tests.fuzz.generate import Program, Step
from tests.fuzz.programs import verdicts


def one(api: str, **options: object) -> str:
    """A call with options other than the usual ones."""
    usual = {"B": 1, "T": 1, "mode": "a", "depth": 1, "big": False, "mask": False}
    return f"session.{api}({', '.join(f'{k}={v!r}' for k, v in (usual | options).items())})"


def around(kind: str, *inside: str) -> Step:
    return Step(kind, tuple(map(Step, inside)))


GATE = around("reversed batch", "experts of samples")

#: What was found, shrunk, and what each call gives now.
FOUND: dict[str, tuple[Program, list[str]]] = {
    "rows in reverse": (Program((around("reversed batch", "linear"),), (one("record", B=2),)), ["right"]),
    "rows in reverse, one of whose gradients is rounding": (
        Program((around("reversed batch", "group norm"),), (one("record", B=2, big=True),)),
        ["right"],
    ),
    "rows sorted": (
        Program((around("sorted batch", "attention with a mask"),), (one("features", B=4, T=4),)),
        ["right"],
    ),
    "twice the rows": (Program((around("batch doubled", "LSTM"),), (one("record"),)), ["right"]),
    "every row twice": (Program((around("batch repeated", "attention"),), (one("features"),)), ["right"]),
    "the batch where another dimension should be": (
        Program((around("batch second", "GRU's last state"),), (one("clip"), one("clip", B=3))),
        ["refused", "refused"],
    ),
    "folded, at two lengths": (
        Program((around("folded", "layer norm"),), (one("record"), one("record", B=2, T=2))),
        ["right", "right"],
    ),
    "positions of a folded batch": (Program((around("folded", "positions"),), (one("features"),)), ["right"]),
    "samples that interact, alone first": (
        Program((Step("samples mixed"),), (one("clip"), one("clip", B=2)), input="tokens"),
        ["right", "refused"],
    ),
    "an attribute that forward writes": (
        Program((Step("attribute counted"), Step("linear")), (one("record"), one("record"))),
        ["right", "right"],
    ),
    "tokens gathered by expert": (
        Program((Step("experts by mask"),), (one("features", B=2), one("clip", B=2, T=3))),
        ["right", "right"],
    ),
    "a mask as long as the batch": (
        Program((Step("attention with a mask"),), (one("features", B=4, T=4, mask=True),)),
        ["right"],
    ),
    "an output without gradients": (
        Program((), (one("record"), one("clip")), head="functional", output="tuple"),
        ["right", "right"],
    ),
    "positions of one, beside a bare weight": (
        Program((Step("standardized weight"), Step("positions")), (one("features"),)),
        ["right"],
    ),
    "several gradients through a checkpoint": (
        Program((around("checkpoint", "attention"),), (one("record", batched=True),)),
        ["right"],
    ),
    "several gradients through a function of one's own": (
        Program((Step("function of one's own"), around("batch doubled", "PReLU")), (one("record", batched=True),)),
        ["right"],
    ),
    "a branch on the size of the batch": (
        Program((around("branch on batch size", "linear"),), (one("features", B=4), one("record", B=3))),
        ["refused", "refused"],
    ),
    "a branch that the last sample opens": (
        Program((around("branch on input", "spectral norm"),), (one("features", B=4, big=True),)),
        ["refused"],
    ),
    "rows in reverse, of which some have no gradient": (
        Program((GATE,), (one("record", B=2), one("features", B=2))),
        ["right", "right"],
    ),
    "rows in reverse, behind a norm of one number": (
        Program((around("reversed batch", "group norm"),), (one("record", B=2, big=True),)),
        ["right"],
    ),
    "indices counted over the batch": (
        Program((Step("embedding scaled by frequency"),), (one("features"), one("record", B=4))),
        ["refused", "refused"],
    ),
    "a checkpoint around a table by index": (
        Program((around("checkpoint", "table by index"),), (one("features"), one("features", B=3, T=2))),
        ["right", "right"],
    ),
    "a mask of one row, on a second path": (
        Program(
            (around("branch on mode", "attention with a mask"), Step("linear")),
            (one("record", mask=True), "session.model.eval()", one("record", mask=True)),
        ),
        ["right", "right"],
    ),
    "a norm of the first sample in a sorted batch": (
        Program(
            (Step("convolution 3d"), Step("RMS norm"), Step("sorted batch", (around("first sample", "RMS norm"),))),
            (one("record"), one("features", B=4)),
            head="none",
            options="loss='bce'",
            seed=6245,
        ),
        ["refused", "refused"],
    ),
    "a layer called for each half of the batch": (
        Program((around("batch in halves", "linear"),), (one("record", B=5, T=2), one("features", B=4))),
        ["right", "right"],
    ),
    "a layer called for each sample": (
        Program(
            (around("sample by sample", "bilinear"),),
            (one("record", B=3, T=2), one("clip", B=2), one("record"), one("features", T=2)),
        ),
        ["right"] * 4,
    ),
    "a branch that changes a sample's numbers by 5e-6 alone": (
        Program(
            (around("branch on input", "batch norm"), around("twice", "linear")),
            (one("record", B=2, big=True),),
            options="loss='bce'",
        ),
        ["refused"],
    ),
    "a branch of a sample alone that counts in a buffer": (
        Program(
            (Step("block", (around("branch on data", "buffer counted"),)),),
            (one("clip", B=2),),
            head="functional",
            options="loss='bce'",
            seed=9401,
        ),
        ["refused"],
    ),
    "attention in evaluation mode, computed again without gradients": (
        Program((around("batch repeated", "scale", "attention"),), ("session.model.eval()", one("clip", B=1, T=1))),
        ["right"],
    ),
    "a gate of another sample": (
        Program((around("batch second", "functional use", "experts of samples"),), (one("record", B=3),)),
        ["refused"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    program, wanted = FOUND[name]
    found = list(verdicts(program))
    assert [verdict.partition(":")[0] for verdict in found] == wanted, found


#: Steps that are refused, and a word of the reason.
REFUSED = {"samples mixed": "independently", "embedding scaled by frequency": "scale_grad_by_freq"}


@pytest.mark.parametrize("kind", steps.LEAVES)
def test_each_kind_of_step_at_two_lengths_and_batch_sizes(kind: str) -> None:
    calls = ("session.model.eval()", one("record", B=5, T=3), one("features", B=4, T=2), one("clip", B=2, T=3))
    for verdict in verdicts(Program((Step("linear"), Step(kind)), calls)):
        if kind in REFUSED:
            assert verdict.startswith("refused"), verdict
            assert REFUSED[kind] in verdict
        else:
            assert verdict == "right"
