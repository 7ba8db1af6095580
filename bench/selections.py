"""What ``fastgrad bench`` can measure, by name."""

from __future__ import annotations

from collections.abc import Iterator

from bench.harness import floor
from bench.harness.case import Case
from bench.micro import rows
from bench.micro.last_layer import cases as last_layer
from bench.micro.network import cases as network
from bench.micro.questions import QUESTIONS

SELECTIONS = {
    "last-layer": "all contrasts, one target and the fused head, against autograd, torch.func, GradNorm, compiled code",
    "network": "whole-network norms against a training step, BackPACK, Opacus, vmap(grad) and a loop",
    "compiled": "the same compiled, beside a training step that is compiled, or finds its memory in place",
    "private": "a step's clipped gradients against a plain step, Opacus' hooks and ghost clipping, vmap(grad)",
    "rows": "the introspective network's first layer, on stored rows and without them",
    "end-to-end": "images per second with and without uncertainty, latency at batch 1",
    "gpu": "the cases that bench/gpu/gpu.sh measures: the kernels' targets and whole networks at training batch sizes",
    "quick": "a small one of each, in under five minutes on two cores",
}
#: Selections whose implementations run in processes of their own on a CPU.
ISOLATED = ("network", "compiled", "private")


def cases(selection: str, device: str = "cpu", seed: int = 0, tiny: bool = False) -> Iterator[Case]:
    """The floor's cases, then those of the selection.

    Args:
        selection: A key of ``SELECTIONS``.
        device: ``"cpu"`` or ``"cuda"``.
        seed: Of models and inputs.
        tiny: Sizes that only walk through the code.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; it was {selection!r}")
    yield from floor.cases(device, tiny)
    if selection == "gpu":
        yield from last_layer.gpu_cases(device, seed, tiny)
        yield from rows.cases("tiny" if tiny else "quick", device, seed)
        yield from network.gpu_cases(device, seed, tiny)
        return
    size = "tiny" if tiny else "quick" if selection == "quick" else "full"
    for name, question in QUESTIONS.items():
        if selection in (name, "quick"):
            yield from question(size, device, seed)
