"""From work and machine code to a predicted time.

    time = launch + max(memory, cache, product, arithmetic) / share of the device that has something to do

- memory: bytes over the data sheet's rate times ``COPY`` (what a copy reaches) and times the share of the loads that
  must be under way at once to hide ``LATENCY_S`` (Little's law: resident programs times their bytes in flight);
- cache: all loads and stores over the second-level cache's rate;
- product: operations over the matrix peak times ``PRODUCT``, an assumption for what Triton's product loops reach;
- arithmetic: the larger of float operations over the lanes and exponentials over the special units, half idle;
- resident programs of a processor follow from registers, shared memory and threads of the compile report;
- the last wave of programs leaves part of the device idle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.roofline import work
from bench.gpu.roofline.devices import DEVICES, Device
from bench.gpu.roofline.work import Work
from fastgrad.ops.heuristics import KNOWN_ARCHITECTURES, Architecture, cdiv

#: Assumptions, the same for all devices unless named: they are what a first run will correct.
COPY, LATENCY_S, LAUNCH_S, ISSUE = 0.92, 700e-9, 2e-6, 0.5
PRODUCT = {"sm_80": 0.75, "sm_90": 0.65, "sm_100": 0.5, "gfx942": 0.45}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Prediction:
    """One case on one device.

    Attributes:
        seconds: All launches together.
        limit: The resource that takes longest in the longest launch.
        memory_fraction: Bytes that must move, over the time, as a share of the data sheet's memory rate.
        matrix_fraction: Useful operations of the product, over the time, as a share of the matrix peak.
        occupancy: Resident warps over what a processor can hold, of the longest launch.
    """

    case: str
    device: str
    seconds: float
    limit: str
    memory_fraction: float
    matrix_fraction: float
    occupancy: float
    registers: int
    shared: int


#: The modelled cases, named as in the compile report.
CASES: tuple[str, ...] = (
    "contrast_sqnorm B=4096 N=1000 D=512 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=16384 D=4096 fp32 cross_entropy",
    "contrast_sqnorm B=4096 N=32000 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=262144 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=8 N=131072 D=4096 bf16 cross_entropy",
    "target_sqnorm B=4096 N=1000 D=512 bf16 ones cross_entropy",
    "linear_contrast_sqnorm B=1 N=1000 D=2048 bf16 cross_entropy",
    "linear_contrast_sqnorm B=32 N=1000 D=2048 bf16 cross_entropy",
    "linear_contrast_sqnorm B=64 N=32000 D=4096 bf16 cross_entropy",
    "linear_contrast_sqnorm B=1024 N=32000 D=4096 bf16 cross_entropy",
    "linear_contrast_sqnorm B=1024 N=1000 D=2048 fp32 cross_entropy",
    "linear_contrast_stats B=8 N=128256 D=4096 bf16 cross_entropy",
    "linear_contrast_stats B=1024 N=128256 D=4096 bf16 cross_entropy",
)


def parse(case: str) -> tuple[str, dict[str, int], torch.dtype]:
    """Operator, sizes by letter and dtype of a case's name."""
    sizes = {letter: int(number) for letter, number in re.findall(r"\b([BNDU])=(\d+)", case)}
    return case.split()[0], sizes, DTYPES[next(word for word in case.split() if word in DTYPES)]


def launches(case: str, arch: Architecture, cache: float = 50e6) -> list[Work]:
    """The launches of a case on an architecture with ``cache`` bytes of second-level cache."""
    operator, sizes, dtype = parse(case)
    B, N, D = sizes["B"], sizes["N"], sizes["D"]
    made: dict[str, Callable[[], list[Work]]] = {
        "contrast_sqnorm": lambda: work.contrast(B, N, D, dtype, arch, cache),
        "target_sqnorm": lambda: work.target(B, N, D, dtype, arch),
        "linear_contrast_sqnorm": lambda: work.linear_contrast(B, N, D, dtype, arch, cache),
        "linear_contrast_stats": lambda: work.linear_stats(B, N, D, dtype, arch, cache),
    }
    return made[operator]()


def resources(rows: Sequence[Mapping[str, Any]], case: str, launch: Work, arch: str) -> tuple[int, int]:
    """Registers a thread and shared bytes a program, from the compile report.

    Equal launches are compiled once and stand under the first case's name; then the row of the same kernel, dtype and
    number of warps with the most registers stands in.
    """
    same = [r for r in rows if r["kernel"] == launch.kernel and r["arch"] == arch]
    exact = [r for r in same if r["case"] == case]
    dtype = next(word for word in case.split() if word in DTYPES)
    near = [
        r for r in same if r["warps"] == launch.warps and dtype in r["case"].split() and " log" not in r["case"]
        and "brier" not in r["case"]
    ]  # fmt: skip
    chosen = exact or near or same
    if not chosen:
        raise ValueError(f"the compile report must hold {launch.kernel} for {arch}; it does not")
    worst = max(chosen, key=lambda r: r["registers"])
    return int(worst["registers"]), int(worst["shared"])


def resident(device: Device, registers: int, shared: int, warps: int) -> int:
    """Programs that a processor holds at once."""
    threads = warps * device.warp
    by_registers = device.registers // max(1, cdiv(registers, 8) * 8 * threads)
    by_shared = device.shared // (shared + 1024) if shared else 32
    return max(1, min(by_registers, by_shared, device.threads // threads, 32))


def predict_launch(
    launch: Work, device: Device, single: bool, registers: int, shared: int
) -> tuple[float, str, float]:
    """Seconds, limiting resource and occupancy of one launch."""
    held = resident(device, registers, shared, launch.warps)
    slots = held * device.processors
    waves = cdiv(launch.programs, slots)
    busy = launch.programs / (waves * slots)
    # A last wave that is not full still reads with those programs that are there.
    running = min(held, cdiv(launch.programs, device.processors))
    needed = device.memory / device.processors * LATENCY_S
    hidden = min(1.0, running * launch.in_flight / needed) if launch.in_flight else 1.0
    spread = min(1.0, launch.programs / device.processors)
    lanes = device.processors * device.clock_hz * ISSUE
    times = {
        "memory": launch.memory / (device.memory * COPY * hidden * spread),
        "cache": (launch.loaded + launch.stored) / (device.cache_rate * spread),
        "product": launch.product
        / ((device.single if single else device.half) * PRODUCT[device.arch])
        / (busy if waves > 1 else min(1.0, launch.programs / device.processors)),
        "arithmetic": max(launch.elementwise / device.lanes, launch.exponentials / device.special)
        / lanes
        / spread,
    }
    limit = max(times, key=lambda name: times[name])
    occupancy = (
        min(held, cdiv(launch.programs, device.processors)) * launch.warps * device.warp / device.threads
    )
    return times[limit], limit, occupancy


def predict(case: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Prediction:
    """Predict a case on a device of ``DEVICES`` from the compile report's rows."""
    device = DEVICES[name]
    single = parse(case)[2] == torch.float32
    works = launches(case, KNOWN_ARCHITECTURES[device.arch], device.cache)
    parts = []
    for launch in works:
        registers, shared = resources(rows, case, launch, device.arch)
        parts.append((*predict_launch(launch, device, single, registers, shared), registers, shared))
    seconds = LAUNCH_S * len(parts) + sum(part[0] for part in parts)
    longest = max(parts, key=lambda part: part[0])
    limit = "launch" if LAUNCH_S * len(parts) > seconds / 2 else longest[1]
    memory, useful = sum(w.memory for w in works), sum(w.useful for w in works)
    return Prediction(
        case, name, seconds, limit, memory / seconds / device.memory,
        useful / seconds / (device.single if single else device.half), longest[2], longest[3], longest[4],
    )  # fmt: skip


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a compile report."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows
