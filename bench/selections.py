"""What ``fastgrad bench`` can measure, by name."""

from __future__ import annotations

from collections.abc import Iterator

from bench import harness_floor
from bench.harness import Case
from bench.micro import end_to_end, last_layer, network, rows

SELECTIONS = {
    "last-layer": "all contrasts, one target and the fused head, against autograd, torch.func, GradNorm, compiled code",
    "network": "whole-network norms against a training step, BackPACK, Opacus, vmap(grad) and a loop",
    "rows": "the introspective network's first layer, on stored rows and without them",
    "end-to-end": "images per second with and without uncertainty, latency at batch 1",
    "gpu": "the cases that bench/gpu.sh measures: the kernels' targets and whole networks at training batch sizes",
    "quick": "a small one of each, in under five minutes on two cores",
}
_MODULES = {"last-layer": last_layer, "network": network, "rows": rows, "end-to-end": end_to_end}


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
    yield from harness_floor.cases(device, tiny)
    if selection == "gpu":
        yield from last_layer.gpu_cases(device, seed, tiny)
        yield from rows.cases("tiny" if tiny else "quick", device, seed)
        yield from network.gpu_cases(device, seed, tiny)
        return
    for name, module in _MODULES.items():
        if selection in (name, "quick"):
            yield from module.cases(
                "tiny" if tiny else "quick" if selection == "quick" else "full", device, seed
            )
