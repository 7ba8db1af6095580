"""Load on the loopback server: throughput and latency with uncertainty and without, every answer checked.

``python -m bench.deploy.serve_load`` trains nothing: a small convolutional network with random weights is exported
twice, with its gradients' uncertainty and plain. Both run behind the same server in turn, under the same clients:
processes of their own with many connections, which check each answer against the direct call.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import results_file
from fastgrad.deploy.export import export
from fastgrad.deploy.images import decode_image
from fastgrad.deploy.package import ModelPackage
from fastgrad.two_stage import TwoStageModel

SHAPE = (3, 32, 32)


def network() -> nn.Module:
    """Some 40 million multiply-adds an image, as small networks for 32 x 32 images have."""
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


def pictures(count: int) -> list[bytes]:
    """PNG files of smooth random color."""
    import io

    from PIL import Image

    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize(SHAPE[1:], Image.Resampling.BICUBIC).save(out, "PNG")
        found.append(out.getvalue())
    return found


def prepare(folder: Path) -> dict[str, Path]:
    """Export both models (once; files in the folder are used again)."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = network().eval()
    files = {"with uncertainty": folder / "gradients.pt2", "plain network": folder / "plain.pt2"}
    if not all(file.exists() for file in files.values()):
        for _ in range(3):  # running statistics that fit the pictures
            net.train()(torch.stack([_pixels(content) for content in pictures(256)]))
        net.eval()
        x = torch.stack([_pixels(content) for content in pictures(300)])
        loader = [(x[i : i + 50],) for i in range(0, len(x), 50)]
        model = TwoStageModel(net, blocks=["gradients", "logits", "features", "image"]).fit(loader, ())
        export(model.eval(), x[:1], files["with uncertainty"], max_batch=64)
        export(Plain(net).eval(), x[:1], files["plain network"], max_batch=64)
    return files


def _pixels(content: bytes) -> Tensor:
    from fastgrad.deploy.package import Description

    return decode_image(content, Description(SHAPE, "float32", 10, 1, "cpu"))


async def _connection(
    port: int, number: int, jobs: list[bytes], expected: list[float], count: int
) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    for i in range(count):
        index = (number * 7919 + i) % len(jobs)
        start = time.perf_counter()
        writer.write(
            b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
            + f"Content-Length: {len(jobs[index])}\r\n\r\n".encode()
            + jobs[index]
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))  # type: ignore[union-attr]
        answer = json.loads(await reader.readexactly(length))
        times.append(time.perf_counter() - start)
        assert head.startswith(b"HTTP/1.1 200"), (head, answer)
        if not np.isclose(answer["uncertainty"], expected[index], rtol=1e-3, atol=1e-3):
            raise AssertionError(f"swapped or wrong: {answer['uncertainty']} instead of {expected[index]}")
    writer.close()
    return times


def load(port: int, file: Path, connections: int, each: int) -> list[float]:
    """Latencies of all requests."""
    jobs = pictures(200)
    package = ModelPackage(file)
    inputs = torch.stack([decode_image(content, package.description) for content in jobs])
    expected = torch.cat([package(part).uncertainty for part in inputs.split(50)]).tolist()

    async def run() -> list[float]:
        parts = await asyncio.gather(
            *(_connection(port, n, jobs, expected, each) for n in range(connections))
        )
        return [value for part in parts for value in part]

    return asyncio.run(run())


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=3000, help="in all, at each number of connections")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--prepare", action="store_true", help="only export the models into the cache")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        files = prepare(folder)
        if args.prepare:
            return
        for name, file in files.items():
            process, port = serve(file)
            load(port, file, 8, 20)
            for connections in args.connections:
                total = min(args.requests, 500) if connections == 1 else args.requests
                start = time.perf_counter()
                times = load(port, file, connections, total // connections)
                seconds = time.perf_counter() - start
                cut = statistics.quantiles(times, n=100)
                rows.append(
                    {"model": name, "connections": connections, "requests": len(times), "errors": 0, "wrong": 0,
                     "per_s": len(times) / seconds, "p50_ms": 1e3 * cut[49], "p90_ms": 1e3 * cut[89],
                     "p99_ms": 1e3 * cut[98]}
                )  # fmt: skip
                print(rows[-1], flush=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    results_file.write(
        "serve",
        "Server under load",
        rows,
        [
            (
                "One worker process and one compute thread for the model, the clients on the same two cores; 32 x 32 "
                "color PNG images decoded by the server; every answer compared with the direct call (a wrong or "
                "missing one ends the run).",
                results_file.table(
                    [{**row, **{key: f"{row[key]:.1f}" for key in ("per_s", "p50_ms", "p90_ms", "p99_ms")}}
                     for row in rows],
                    {"model": "model", "connections": "connections", "requests": "requests",
                     "per_s": "requests/s", "p50_ms": "median ms", "p90_ms": "90 % ms", "p99_ms": "99 % ms"},
                ),
            ),
        ],
        mode="full",
        packages=("torch", "fastapi", "uvicorn", "numpy"),
        folder=args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
