"""From which batch size fastgrad's norms pay, beside a loop over the samples and vmap(grad), in time and memory.

python -m bench.break_even
python -m bench.break_even --only ResNet --batches 64       # the file's other rows stay
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench import clock
from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS
from bench.micro.network import features
from bench.micro.tasks import BCE, CE, Task
from bench.report import pages

NETS = {"plain CNN 32x32": BCE, "GPT T=128": CE, "ResNet-18 32x32": BCE}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 2
CALLS = {"fastgrad": features, "per-sample loop": peers.loop, "vmap(grad)": peers.vmap}


def measure(only: str = "", batches: Sequence[int] = BATCHES) -> Iterator[dict[str, Any]]:
    """Yield for each network and batch the least processor time of two calls, taken in turns, and peak bytes."""
    torch.set_num_threads(1)
    for network in (name for name in NETS if only in name):
        for batch in batches:
            task = Task(NETWORKS[network], batch, "cpu", NETS[network])
            calls = {name: make(task) for name, make in CALLS.items()}
            taken = clock.in_turns([lambda n, call=call: clock.seconds(call, n) for call in calls.values()], REPEATS)
            row: dict[str, Any] = {"network": network, "batch": batch}
            for (name, call), times in zip(calls.items(), taken, strict=True):
                row[name] = {"seconds": min(times), "peak_bytes": clock.peak_bytes(call, "cpu")}
            yield row


if __name__ == "__main__":
    pages.command(
        "break-even", __doc__, measure, packages=("torch",), keys=("network", "batch"),
        only={"default": "", "metavar": "TEXT", "help": "networks whose name contains it"},
        batches={"type": int, "nargs": "+", "default": BATCHES},
    )  # fmt: skip
