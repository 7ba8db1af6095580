"""Load on the loopback server: throughput and latency with uncertainty and without, every answer checked.

``python -m bench.deploy.serve_load`` trains nothing: networks with random weights are exported twice, with the
uncertainty of the default blocks and plain. Both files run behind servers of their own, which the same clients load in
turn, round by round, so that a slow minute of the machine hits both. The clients are many connections of a process of
their own, which check each answer against the direct call and count what is missing, refused or wrong. Where that is
not 0, the numbers are printed and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.deploy.clients import Clients, Tally, pictures
from bench.report import pages
from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import Description
from fastgrad.detector.model import TwoStageModel
from fastgrad.detector.presets import DEFAULT_BLOCKS as USUAL

#: What is served: images of one size, and the network that takes them.
SIDES = {"small": 32, "resnet18": 112}


def network(name: str) -> nn.Module:
    """ResNet-18, or some 10 million multiply-adds an image, as the smallest networks for 32 x 32 images have."""
    if name == "resnet18":
        from torchvision.models import resnet18

        net: nn.Module = resnet18(num_classes=10)
        return net
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 32, 64, 128)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Plain(nn.Module):
    """The network with the two-stage signature and no uncertainty but the probability of its class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, probabilities, 1 - largest probability."""
        logits = self.net(x).detach()
        probabilities = logits.softmax(1)
        return logits, probabilities, 1 - probabilities.max(1).values


def prepare(name: str, folder: Path) -> dict[str, Path]:
    """Export both forms of a network (once; files in the folder are used again)."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net, side = network(name).eval(), SIDES[name]
    files = {"plain": folder / f"{name}-plain.pt2", "with uncertainty": folder / f"{name}.pt2"}
    if not all(file.exists() for file in files.values()):
        description = Description((3, side, side), "float32", 10, 1, "cpu")
        x = torch.stack([decode_image(content, description) for content in pictures(300, side)])
        for part in x[:192].split(64):  # running statistics that fit the pictures
            net.train()(part)
        net.eval()
        loader = [(part,) for part in x.split(50)]
        model = TwoStageModel(net, blocks=USUAL).fit(loader, None)
        export(model, x[:1], files["with uncertainty"], max_batch=64)
        export(Plain(net).eval(), x[:1], files["plain"], max_batch=64)
    return files


def serve(file: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """Start the server; its process and port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgrad", "serve", str(file),
         "--port", "0", "--threads", "1", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            return process, int(match.group(1))
    raise RuntimeError("the server did not start")


def measure(
    name: str, files: dict[str, Path], connections: Sequence[int], requests: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of one network: both servers loaded in turn."""
    running = {form: serve(file) for form, file in files.items()}
    try:
        clients = {form: Clients(file) for form, file in files.items()}
        rows: list[dict[str, Any]] = []
        for form, (_, port) in running.items():
            clients[form].load(port, 8, 20)
        for count in connections:
            tallies = {form: Tally() for form in files}
            rates: dict[str, list[float]] = {form: [] for form in files}
            for _ in range(rounds):
                for form, (_, port) in running.items():
                    found, seconds = clients[form].load(port, count, max(1, requests // rounds // count))
                    rates[form].append(len(found.times) / seconds)
                    tallies[form] += found
            for form, tally in tallies.items():
                sent = count * rounds * max(1, requests // rounds // count)
                if tally.errors or tally.wrong:
                    raise SystemExit(f"{name}, {form}: of {sent} requests {tally.errors} without answer or refused, "
                                     f"{tally.wrong} answered wrongly")  # fmt: skip
                cut = statistics.quantiles(tally.times, n=100)
                rows.append(
                    {"network": name, "model": form, "connections": count, "requests": sent, "errors": tally.errors,
                     "wrong": tally.wrong, "per_s": statistics.median(rates[form]), "p50_ms": 1e3 * cut[49],
                     "p99_ms": 1e3 * cut[98], "throughput": None, "p99": None}
                )  # fmt: skip
            plain, ours = rows[-2:]
            ours |= {"throughput": ours["per_s"] / plain["per_s"], "p99": ours["p99_ms"] / plain["p99_ms"]}
            print(rows[-2:], flush=True)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)
    assert all(process.wait(60) == 0 for process, _ in running.values())
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=3000, help="in all, at each number of connections")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both servers")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.networks:
            files = prepare(name, folder)
            rows += measure(name, files, args.connections, args.requests, args.rounds)
    pages.save("serve", rows, packages=("torch", "fastapi", "uvicorn", "numpy"), folder=args.out)


if __name__ == "__main__":
    main()
