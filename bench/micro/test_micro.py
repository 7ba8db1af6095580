"""The micro benchmarks as items of pytest-benchmark, each checked before it is timed.

pytest bench/micro --benchmark-enable                                   # everything, quick sizes
pytest bench/micro --benchmark-enable -k "network and ResNet and fastgrad"
FASTGRAD_BENCH_SIZE=full pytest bench/micro --benchmark-enable          # full sizes
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness.case import Implementation, Result
from bench.harness.measure import gate
from bench.micro.questions import QUESTIONS

SIZE = os.environ.get("FASTGRAD_BENCH_SIZE", "quick")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Implementations are named here because building them needs the inputs.
NAMES = {
    "last-layer": [
        "fastgrad Triton", "fastgrad eager", "torch.softmax", "linear alone", "closed form, textbook",
        "closed form, torch.compile", "linear, softmax, closed form", "the same, torch.compile", "vmap(grad)",
        "autograd loop", "GradNorm, as OpenOOD", "GradNorm, pytorch-ood", "Liger fused linear loss",
        "Cut Cross-Entropy",
    ],
    "network": [
        "fastgrad", "training step", "forward", "BackPACK BatchL2Grad", "Opacus ghost norms", "vmap(grad)",
        "per-sample loop",
    ],
    "compiled": [
        "fastgrad, compiled", "fastgrad", "training step", "training step, memory kept", "training step, compiled",
    ],
    "private": ["fastgrad", "training step", "Opacus hooks", "Opacus ghost clipping", "vmap(grad)"],
    "rows": ["fastgrad Triton", "fastgrad eager", "stored rows", "rows written, then linear"],
    "end-to-end": [
        "network alone", "fastgrad, last layer", "fastgrad, whole network", "fastgrad, three signals",
        "gradient per sample",
    ],
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def _built(question: str, case: str) -> list[Implementation]:
    return next(c for c in QUESTIONS[question](SIZE, DEVICE, 0) if c.name == case).implementations()


def _parameters() -> list[Any]:
    return [
        pytest.param(question, case.name, name, id=f"{question}-{case.name}-{name}")
        for question, cases in QUESTIONS.items()
        for case in cases(SIZE, DEVICE, 0)
        for name in NAMES[question]
    ]


@pytest.mark.parametrize(("question", "case", "name"), _parameters())
def test_micro(benchmark: Any, question: str, case: str, name: str) -> None:
    with warnings.catch_warnings():
        # Peers warn of hooks and missing batching rules; whether their numbers are right is checked.
        warnings.simplefilter("ignore")
        found = [item for item in _built(question, case) if item.name == name]
        if not found:
            pytest.skip(f"{case} has no {name}")
        result = Result(case, name, "", False)
        call = gate(found[0], result)
        if call is None:
            (pytest.fail if name.startswith("fastgrad") else pytest.skip)(f"{name}: {result.note}")
        benchmark.group = case
        benchmark.extra_info["error"] = result.error
        timed = call if DEVICE == "cpu" else functools.partial(_finished, call)
        benchmark.pedantic(timed, rounds=5, iterations=1, warmup_rounds=1)


def _finished(call: Callable[[], Any]) -> None:
    call()
    torch.cuda.synchronize()
