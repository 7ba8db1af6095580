"""What exact per-sample norms of a whole network cannot cost less than, with the products that are known for them.

    python -m bench.micro.network.floor     # bench/results/network-floor.json and .md; about a minute

Every exact method runs the network forward and sends gradients back to all of its layers; both are measured. Then each
layer needs one of two products: the gradient of each sample, ``2 T C K O`` operations for T positions, C inputs, O
outputs and K taps of a kernel, whose squares are added; or the products of positions with positions, of which a half
is enough, ``T (T + 1) (C + O)`` (a convolution's first factor from pixels rather than patches). The fewer of both, at
the highest rate that this machine shows for a product, and inputs and gradients read once at its rate of copying, are
the rest of the floor. Beside it what was measured, and a training step: forward, backward, and the weights' gradients
of the batch.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import results_file
from bench.harness.turns import in_turns
from bench.micro.network import peers
from bench.micro.network.cases import NETWORKS, Network, features
from bench.micro.network.task import OURS, Task


def work(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Fewest operations of the norms of convolutions and linear layers, and bytes of what enters and leaves them."""
    found = [0.0, 0.0]

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, samples = inputs[0], len(x)
        if isinstance(layer, nn.Conv2d):
            pixels, positions = math.prod(a.shape[2:]), math.prod(output.shape[2:])
            inner, taps = a.shape[1] // layer.groups, math.prod(layer.kernel_size)
            outer, groups = output.shape[1] // layer.groups, layer.groups
        else:
            pixels = positions = a.numel() // a.shape[-1] // samples
            inner, taps, outer, groups = a.shape[-1], 1, output.shape[-1], 1
        direct = 2 * positions * inner * taps * outer
        pairs = min(pixels * (pixels + 1) * inner, positions * (positions + 1) * inner * taps)
        # One position alone has a gradient of rank one.
        gram = pairs + positions * (positions + 1) * outer
        found[0] += samples * groups * min(direct, gram)
        found[1] += a.element_size() * (a.numel() + output.numel())

    handles = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found[0], found[1]


def rates() -> tuple[float, float]:
    """Operations a second of the faster of the framework's two libraries for products, and bytes a second of a copy."""
    a, image, weight = torch.rand(1024, 1024), torch.rand(8, 256, 32, 32), torch.rand(256, 256, 3, 3)
    source = torch.rand(1 << 25)
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {
        "matrix": lambda: a @ a,
        "convolution": lambda: F.conv2d(image, weight, padding=1),
        "copy": lambda: target.copy_(source),
    }
    seconds = {name: min(taken) for name, taken in in_turns(calls, 9).items()}
    operations = {"matrix": 2 * 1024**3, "convolution": 2 * 8 * 256 * 256 * 9 * 32 * 32}
    return max(n / seconds[name] for name, n in operations.items()), 2 * source.nbytes / seconds["copy"]


def measure(network: Network, product: float, copy: float, rounds: int) -> dict[str, Any]:
    """One network, by processor time of one thread; times in seconds.

    Raises:
        RuntimeError: The norms are not correct.
    """
    task = Task(network.build, network.inputs, network.signal, "cpu", 0)
    norms = features(task)
    error = task.error(norms())
    if not error <= OURS:
        raise RuntimeError(
            f"norms of {network.name} must be correct to be timed; their error was {error:.1e}"
        )
    calls: dict[str, Callable[[], object]] = {
        "step": peers.step(task), "begin": peers.data_gradients(task), "fastgrad": norms,
    }  # fmt: skip
    taken = {call: statistics.median(times) for call, times in in_turns(calls, rounds).items()}
    operations, read = work(task.model, task.x)
    rest = max(operations / product, read / copy)
    return {
        "network": network.name, "batch": network.batch, **taken, "operations": operations, "bytes": read,
        "rest": rest, "floor": taken["begin"] + rest,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="What exact per-sample norms cannot cost less than.")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    product, copy = rates()
    rows = [measure(network, product, copy, args.rounds) for network in NETWORKS]
    shown = [
        {
            "network": row["network"],
            "batch": row["batch"],
            "forward and data gradients": f"{row['begin'] / row['step']:.2f}",
            "norms, GFLOP": f"{row['operations'] / 1e9:.2f}",
            "norms, MB": f"{row['bytes'] / 1e6:.0f}",
            "norms at these rates": f"{row['rest'] / row['step']:.2f}",
            "floor": f"{row['floor'] / row['step']:.2f}",
            "fastgrad": f"{row['fastgrad'] / row['step']:.2f}",
        }
        for row in rows
    ]
    text = (
        "Processor time over that of one training step, one thread, medians of calls in turn. *norms*: the fewest "
        "operations of the known exact products, all layers of the batch together, and the bytes of their inputs and "
        f"of the gradients at their outputs; at {product / 1e9:.0f} GFLOP/s and {copy / 1e9:.1f} GB/s, the highest "
        "rates that this machine shows for a large product and for a copy. Small products do not reach them, so the "
        "floor is below what can be had."
    )
    results_file.write(
        "network-floor", "Floors of whole-network norms", rows, [(text, results_file.table(shown))], mode="full",
        folder=args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
