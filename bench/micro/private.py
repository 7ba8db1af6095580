"""A training step whose gradients are clipped sample by sample, up to the noise, beside a plain step.

Allowed distance from the sum of clipped float64 gradients, all parameters together, relative to their length: 1e-4 for
fastgrad, float32 through some fifty layers, and 1e-3 for the peers. Opacus adds 1e-6 to every norm on purpose;
vmap(grad) is off by 2e-4 on the residual network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS
from bench.micro.network import OURS, PEERS, one
from bench.micro.tasks import ClippedTask
from bench.registry import Implementation, case


@case(
    "private", "{0} B={1} clipped", against="training step",
    names=("fastgrad", "training step", "Opacus hooks", "Opacus ghost clipping", "vmap(grad)"),
    tiny=[("plain CNN 8x8", 3)], quick=[("ResNet-18 group norm 32x32", 8)],
    full=[("ResNet-18 group norm 32x32", 64), ("ViT-B/16 64x64", 8), ("GPT T=128", 16)],
)  # fmt: skip
def private(device: str, name: str, batch: int) -> Iterator[Implementation]:
    """The sum of clipped gradients."""
    task = ClippedTask(NETWORKS[name], batch, device)
    yield one("fastgrad", partial(peers.clipped, task), task.distance, OURS)
    yield one("training step", partial(peers.whole_step, task), partial(task.distance, limit=math.inf), OURS)
    yield one("Opacus hooks", partial(peers.clipped_by_hooks, task), task.distance, PEERS)
    yield one("Opacus ghost clipping", partial(peers.clipped_by_ghosts, task), task.distance, PEERS)
    yield one("vmap(grad)", partial(peers.clipped_by_vmap, task), task.distance, PEERS)
