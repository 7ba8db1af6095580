"""How fast are all contrasts, one target and the fused head of the last layer?"""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro import benchmarks, last_layer

NAMES = [
    "fastgrad Triton", "fastgrad eager", "torch.softmax", "linear alone", "closed form, textbook",
    "closed form, torch.compile", "linear, softmax, closed form", "the same, torch.compile", "vmap(grad)",
    "autograd loop", "GradNorm, as OpenOOD", "GradNorm, pytorch-ood", "Liger fused linear loss", "Cut Cross-Entropy",
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), benchmarks.parameters(last_layer.cases, NAMES))
def test_last_layer(benchmark: Any, case: str, name: str) -> None:
    benchmarks.run(benchmark, last_layer.cases, case, name)
