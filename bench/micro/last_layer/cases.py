"""Shapes and dtypes of the last layer's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness.case import Case, Implementation
from bench.micro.last_layer import tasks
from bench.micro.last_layer.head import Shape

SHAPES: dict[tuple[str, str], list[Shape]] = {
    ("tiny", "cpu"): [(3, 5, 8), (2, 33, 16)],
    ("quick", "cpu"): [(64, 10, 512), (1, 1000, 512), (256, 1000, 512)],
    ("full", "cpu"): [
        (1, 10, 512), (64, 10, 512), (4096, 10, 512),
        (1, 1000, 512), (8, 1000, 512), (32, 1000, 512), (256, 1000, 512), (4096, 1000, 512),
        (1, 32000, 768), (32, 32000, 768), (256, 32000, 768), (1, 128256, 1024), (8, 128256, 1024),
    ],
    ("quick", "cuda"): [(1, 1000, 2048), (256, 1000, 2048), (1024, 32000, 4096)],
    ("full", "cuda"): [
        (4096, 10, 512), (1, 1000, 2048), (8, 1000, 2048), (32, 1000, 2048), (256, 1000, 2048), (4096, 1000, 2048),
        (32, 32000, 4096), (1024, 32000, 4096), (4096, 32000, 4096), (1, 128256, 4096), (1024, 128256, 4096),
    ],
}  # fmt: skip


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    shapes = SHAPES["tiny" if size == "tiny" else size, "cpu" if size == "tiny" else device]
    main = torch.bfloat16 if device == "cuda" else torch.float32
    halves = (256, 1000, 512) if device == "cpu" else (256, 1000, 2048)
    for shape in shapes:
        dtypes = [main]
        if size != "quick" and shape == halves:
            dtypes += [d for d in (torch.float32, torch.float16, torch.bfloat16) if d != main]
        for dtype in dtypes:
            yield _case("contrasts", tasks.contrasts, shape, dtype, device, seed, "torch.softmax")
            if dtype == main:
                yield _case("head", tasks.head, shape, dtype, device, seed, "linear alone")
    for shape in shapes[:2] if size != "full" else shapes:
        if shape[0] > 1:
            yield _case("uniform target", tasks.uniform, shape, main, device, seed, "torch.softmax")
    yield _case("statistics", tasks.statistics, shapes[-1], main, device, seed, "linear alone")


def gpu_cases(device: str = "cuda", seed: int = 0, tiny: bool = False) -> Iterator[Case]:
    """The sizes that the kernels have targets for, without compiled peers except once."""
    if tiny:
        yield _case(
            "contrasts",
            tasks.contrasts,
            (3, 5, 8),
            torch.float32,
            device,
            seed,
            "torch.softmax",
            ("compile",),
        )
        yield _case(
            "head", tasks.head, (2, 33, 16), torch.float32, device, seed, "linear alone", ("compile",)
        )
        return
    half = torch.bfloat16
    slow = ("compile", "loop", "vmap")
    yield _case("contrasts", tasks.contrasts, (4096, 32000, 4096), half, device, seed, "torch.softmax", slow)
    yield _case(
        "contrasts", tasks.contrasts, (256, 1000, 2048), half, device, seed, "torch.softmax", ("loop",)
    )
    yield _case(
        "contrasts",
        tasks.contrasts,
        (8, 1000, 512),
        torch.float32,
        device,
        seed,
        "torch.softmax",
        ("compile",),
    )
    yield _case("head", tasks.head, (1024, 32000, 4096), half, device, seed, "linear alone")
    for B in (1, 8, 32, 256):
        yield _case("head", tasks.head, (B, 1000, 2048), half, device, seed, "linear alone", slow)
    yield _case(
        "statistics", tasks.statistics, (1024, 128256, 4096), half, device, seed, "linear alone", slow
    )
    yield _case("uniform target", tasks.uniform, (64, 1000, 2048), half, device, seed, "torch.softmax")


def _case(
    task: str, build: Callable[..., list[Implementation]], shape: Shape, dtype: torch.dtype, device: str, seed: int,
    relative_to: str, without: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    B, N, D = shape
    name = str(dtype).removeprefix("torch.")
    return Case(
        f"{task} B={B} N={N} D={D} {name}",
        lambda: [
            item
            for item in build(shape, dtype, device, seed)
            if not any(word in item.name for word in without)
        ],
        relative_to,
    )
