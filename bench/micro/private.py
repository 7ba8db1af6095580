"""A training step whose gradients are clipped sample by sample, up to the noise, beside a plain step.

Allowed distance from the sum of clipped float64 gradients: see `bench.micro.private_task`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.micro import private_peers as peers
from bench.micro.network import NETWORKS
from bench.micro.private_task import OURS, PEERS, ClippedTask
from bench.registry import Implementation, Place, case


@case(
    "private", "{0} B={1} clipped", against="training step",
    names=("fastgrad", "training step", "Opacus hooks", "Opacus ghost clipping", "vmap(grad)"),
    tiny=[("plain CNN 8x8", 3)], quick=[("ResNet-18 group norm 32x32", 8)],
    full=[("ResNet-18 group norm 32x32", 64), ("ViT-B/16 64x64", 8), ("GPT T=128", 16)],
)  # fmt: skip
def private(place: Place, name: str, batch: int) -> Iterator[Implementation]:
    """The sum of clipped gradients."""
    build, inputs = NETWORKS[name]
    task = ClippedTask(build, inputs(batch), place.device, place.seed)
    one = partial(Implementation, graph=False)
    yield one("fastgrad", lambda: peers.ours(task), task.error, OURS)
    yield one("training step", lambda: peers.step(task), task.step_error, OURS)
    yield one("Opacus hooks", lambda: peers.opacus_hooks(task), task.error, PEERS)
    yield one("Opacus ghost clipping", lambda: peers.opacus_ghost(task), task.error, PEERS)
    yield one("vmap(grad)", lambda: peers.functorch(task), task.error, PEERS)
