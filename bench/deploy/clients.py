"""Clients of a server under load: what they send, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage


def pictures(count: int, side: int) -> list[bytes]:
    """PNG files of smooth random color."""
    import io

    from PIL import Image

    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
        found.append(out.getvalue())
    return found


@dataclasses.dataclass
class Tally:
    """Seconds of each request that was answered, how many had no answer or a refusal, how many a wrong answer."""

    times: list[float] = dataclasses.field(default_factory=list)
    errors: int = 0
    wrong: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Of both."""
        return Tally(self.times + other.times, self.errors + other.errors, self.wrong + other.wrong)


async def connection(port: int, number: int, jobs: list[bytes], expected: list[float], count: int) -> Tally:
    """Send ``count`` of the images ``jobs``, one after another; their uncertainties are ``expected``."""
    tally = Tally()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for i in range(count):
        index = (number * 7919 + i) % len(jobs)
        start = time.perf_counter()
        try:
            status, answer = await _ask(reader, writer, jobs[index])
        except (OSError, EOFError):
            tally.errors += 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        tally.times.append(time.perf_counter() - start)
        if status != 200:
            tally.errors += 1
        elif not np.isclose(answer["uncertainty"], expected[index], rtol=1e-3, atol=1e-3):
            tally.wrong += 1
    writer.close()
    await writer.wait_closed()
    return tally


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> tuple[int, dict[str, Any]]:
    writer.write(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))  # type: ignore[union-attr]
    return int(head.split(b" ", 2)[1]), json.loads(await reader.readexactly(length))


class Clients:
    """What the clients send, and the answers that they expect of a file."""

    def __init__(self, file: Path) -> None:
        package = ModelPackage(file)
        self.jobs = pictures(200, package.description.input_shape[-1])
        inputs = torch.stack([decode_image(content, package.description) for content in self.jobs])
        self.expected = torch.cat([package(part).uncertainty for part in inputs.split(50)]).tolist()

    def load(self, port: int, connections: int, each: int) -> tuple[Tally, float]:
        """What became of all requests, and the seconds that they took together."""

        async def run() -> Tally:
            parts = await asyncio.gather(
                *(connection(port, n, self.jobs, self.expected, each) for n in range(connections))
            )
            return sum(parts, Tally())

        start = time.perf_counter()
        return asyncio.run(run()), time.perf_counter() - start
