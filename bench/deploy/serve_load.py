"""Load on the loopback server: throughput and latency with uncertainty and without, every answer checked.

``python -m bench.deploy.serve_load`` trains nothing: networks with random weights are exported twice, with the
uncertainty of the default blocks and plain. Each file has a server of its own, and the same clients load both in turn.
They have many connections, and compare each answer with the direct call. A missing, refused or wrong answer ends the
run.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from bench.micro.models import plain
from bench.report import pages
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import Description, ModelPackage
from fastgrad.detector.model import TwoStageModel

#: What is served, and the size of its images. The small network has some 10 million multiply-adds per image.
NETWORKS = {"small": (partial(plain, width=16, norm=True), 32), "resnet18": (partial(resnet18, num_classes=10), 112)}
CONNECTIONS, ROUNDS = (1, 16, 64), 5
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


class Plain(nn.Module):
    """The network with the two-stage signature, whose uncertainty is only 1 - the probability of its class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, probabilities, 1 - largest probability."""
        logits = self.net(x).detach()
        probabilities = logits.softmax(1)
        return logits, probabilities, 1 - probabilities.max(1).values


def pictures(count: int, side: int) -> Iterator[bytes]:
    """Yield PNG files of smooth random color."""
    for pixels in np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8):
        out = io.BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
        yield out.getvalue()


def exported(name: str, folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    build, side = NETWORKS[name]
    net = build()
    files = {"plain": folder / f"{name}-plain.pt2", "with uncertainty": folder / f"{name}.pt2"}
    description = Description((3, side, side), "float32", 10, 1, "cpu")
    x = torch.stack([decode_image(content, description) for content in pictures(300, side)])
    for part in x[:192].split(64):  # running statistics that fit the pictures
        net.train()(part)
    net.eval()
    model = TwoStageModel(net, blocks=DEFAULT_BLOCKS).fit(x.split(50), challenges=None)
    export(model, x[:1], files["with uncertainty"], max_batch=64)
    export(Plain(net).eval(), x[:1], files["plain"], max_batch=64)
    return files


@contextlib.contextmanager
def serving(file: Path) -> Iterator[int]:
    """Start a server, yield its port, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgrad", "serve", str(file), "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        matches = (re.search(r"running on http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)
        if (found := next(filter(None, matches), None)) is None:
            raise RuntimeError("the server did not start")
        yield int(found[1])
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0


class Clients:
    """Clients of one server: the images that they send, and the uncertainties that they expect of its file."""

    def __init__(self, file: Path, port: int) -> None:
        package = ModelPackage(file)
        self.port, self.jobs = port, list(pictures(200, package.description.input_shape[-1]))
        inputs = torch.stack([decode_image(content, package.description) for content in self.jobs])
        self.expected = torch.cat([package(part).uncertainty for part in inputs.split(50)]).tolist()

    def load(self, connections: int, each: int) -> tuple[list[float], float]:
        """Return the seconds of each request, and answers per second."""

        async def run() -> list[list[float]]:
            return await asyncio.gather(*(self.connection(number, each) for number in range(connections)))

        start = time.perf_counter()
        times = list(itertools.chain(*asyncio.run(run())))
        return times, len(times) / (time.perf_counter() - start)

    async def connection(self, number: int, count: int) -> list[float]:
        """Send so many images, one after another; return the seconds of each, if all are answered rightly."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        times = []
        try:
            for i in range(count):
                index = (number * 7919 + i) % len(self.jobs)
                start = time.perf_counter()
                writer.write(HEAD % len(self.jobs[index]) + self.jobs[index])
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))  # type: ignore[union-attr]
                answer, wanted = json.loads(await reader.readexactly(length)), self.expected[index]
                times.append(time.perf_counter() - start)
                accepted = head.startswith(b"HTTP/1.1 200 ")
                if not (accepted and np.isclose(answer["uncertainty"], wanted, rtol=1e-3, atol=1e-3)):
                    raise RuntimeError(f"image {index} must have the uncertainty {wanted}; it was {head!r} {answer}")
        finally:
            writer.close()
            await writer.wait_closed()
        return times


def measure(name: str, requests: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network: both servers loaded in turn."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = exported(name, Path(folder))
        clients = {form: Clients(file, stack.enter_context(serving(file))) for form, file in files.items()}
        for one in clients.values():
            one.load(8, 20)
        for count in CONNECTIONS:
            each = max(1, requests // ROUNDS // count)
            turns = [{form: one.load(count, each) for form, one in clients.items()} for _ in range(ROUNDS)]
            base: dict[str, float] = {}
            for form in files:
                cut = statistics.quantiles([t for turn in turns for t in turn[form][0]], n=100)
                per_s, p99 = statistics.median(turn[form][1] for turn in turns), 1e3 * cut[98]
                yield {
                    "network": name, "model": form, "connections": count, "requests": count * ROUNDS * each,
                    "per_s": per_s, "p50_ms": 1e3 * cut[49], "p99_ms": p99,
                    "throughput": per_s / base["per_s"] if base else None, "p99": p99 / base["p99"] if base else None,
                }  # fmt: skip
                base = {"per_s": per_s, "p99": p99}


if __name__ == "__main__":
    versions, number = ("torch", "fastapi", "uvicorn", "numpy"), "in all, at each number of connections"
    pages.command(
        "serve", __doc__, measure, NETWORKS, packages=versions, requests={"type": int, "default": 3000, "help": number}
    )
