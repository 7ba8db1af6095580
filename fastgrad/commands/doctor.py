"""``fastgrad doctor``: versions, devices, and which implementations would run and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import fastgrad
from fastgrad.checks import FLOAT_DTYPES
from fastgrad.ops.dispatch import choose, interpreting, triton_refusal

_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "torchvision", "matplotlib", "fastapi", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastgrad doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def examine() -> dict[str, Any]:
    """Return what ``fastgrad doctor`` prints, with the keys ``versions``, ``machine`` and ``devices``."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "fastgrad": fastgrad.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # The metadata lacks the platform of the build ("+cu124").
    versions["torch"] = torch.__version__
    devices = [("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        devices += [(f"cuda:{index}", torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())]
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
    }


def _implementations(device: torch.device) -> dict[str, dict[str, str]]:
    dtypes = {}
    for dtype in FLOAT_DTYPES:
        runs = choose("auto", torch.empty(0, device=device, dtype=dtype))
        interpreted = "the interpreter is for tests; impl='triton' uses it"
        reason = "the kernels serve this device and dtype" if runs == "triton" else interpreted
        why = triton_refusal(device, dtype) or reason
        dtypes[str(dtype).removeprefix("torch.")] = {"auto": runs, "why": why}
    return dtypes


def run(arguments: argparse.Namespace) -> int:
    """Print what `examine` finds; return 0."""
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
    return 0
