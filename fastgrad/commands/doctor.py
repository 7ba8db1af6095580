"""``fastgrad doctor``: versions, devices, which implementation would run, and why, and which routes were measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import fastgrad
from fastgrad.ops import route_cache
from fastgrad.ops.implementation import choose, interpreting, triton_refusal

_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "torchvision", "matplotlib", "fastapi", "ray")
_LISTED = 10
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastgrad doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def examine() -> dict[str, Any]:
    """What ``fastgrad doctor`` prints: ``{"versions", "machine", "devices", "routes"}``."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "fastgrad": fastgrad.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # The distribution's own metadata lacks what it was built for ("+cu124").
    versions["torch"] = torch.__version__
    devices = [("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        devices += [
            (f"cuda:{index}", torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())
        ]
    return {
        "versions": versions,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda_runtime": torch.version.cuda,
            "rocm_runtime": torch.version.hip,
            "triton_interpreter": interpreting(),
        },
        "devices": [
            {"device": device, "name": name, "implementations": _implementations(torch.device(device))}
            for device, name in devices
        ],
        "routes": {
            "chosen_by": route_cache.mode(),
            "file": str(route_cache.path()),
            "measured": {here: _routes(shapes) for here, shapes in route_cache.stored().items()},
        },
    }


def _routes(shapes: dict[str, dict[str, float]]) -> dict[str, Any]:
    """How many shapes were measured, what all of them together gain, and which routes differ, most gain first."""
    before = after = 0.0
    differ: list[dict[str, Any]] = []
    for shape, seconds in shapes.items():
        model, measured = next(iter(seconds)), route_cache.fastest(seconds)
        saved = seconds[model] - seconds[measured]
        before, after = before + seconds[model], after + seconds[measured]
        if measured != model:
            differ.append({"shape": shape, "model": model, "measured": measured, "seconds_saved": saved})
    differ.sort(key=lambda row: -row["seconds_saved"])
    return {"shapes": len(shapes), "time_saved": 1 - after / before if before else 0.0, "differ": differ}


def _implementations(device: torch.device) -> dict[str, dict[str, str]]:
    found = {}
    for dtype in _DTYPES:
        refusal = triton_refusal(device, dtype)
        runs = choose("auto", torch.empty(0, device=device, dtype=dtype))
        if runs == "triton":
            reason = "the kernels serve this device and dtype"
        elif refusal is None:
            reason = "the interpreter is for tests; impl='triton' uses it"
        else:
            reason = refusal
        found[str(dtype).removeprefix("torch.")] = {"auto": runs, "why": reason}
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print the examination; returns 0."""
    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=2))
        return 0
    print("versions")
    for name, version in findings["versions"].items():
        print(f"  {name:14} {version or 'not installed'}")
    print("machine")
    for name, value in findings["machine"].items():
        print(f"  {name:18} {value}")
    for entry in findings["devices"]:
        print(f"{entry['device']}: {entry['name']}")
        for dtype, choice in entry["implementations"].items():
            print(f"  {dtype:10} {choice['auto']:7} {choice['why']}")
    routes = findings["routes"]
    print(f"routes: chosen by {routes['chosen_by']} (FASTGRAD_ROUTES)")
    print(f"  {routes['file']}{'' if routes['measured'] else ': nothing measured'}")
    for here, found in routes["measured"].items():
        differ = found["differ"]
        print(f"  {here}")
        print(
            f"    shapes measured: {found['shapes']}; another route than the cost model's: {len(differ)}; "
            f"time over all shapes: {-100 * found['time_saved']:.1f} %"
        )
        for row in differ[:_LISTED]:
            saved = f"{1e3 * row['seconds_saved']:.3g} ms less"
            print(f"    {row['measured']} instead of {row['model']}, {saved}: {row['shape']}")
    return 0
