"""Every route on every convolution of the zoo: is the one that the cost model picks the fastest?

    python -m bench.micro.conv_routes --slice 0/4     # measure a quarter of the shapes, added to the raw file
    python -m bench.micro.conv_routes --report        # bench/results/conv-routes.json and .md from the raw file

The acceptance is a pick within 20 % of the measured best for at least 90 % of the shapes. A route predicted
more than `HOPELESS` times slower than the pick is not measured, and one that turns out `SLOW` times slower
than the best so far is run twice.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from bench.report import pages
from fastgrad.ops.conv import cost
from fastgrad.ops.conv.geometry import canonical
from fastgrad.ops.conv.sqnorm import conv_sqnorm, shape_of

BATCH, IMAGE = 16, 64
HOPELESS, SLOW = 12.0, 4.0
MODELS = (
    "resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0", "googlenet",
    "vgg11_bn", "squeezenet1_1", "regnet_y_400mf", "mnasnet1_0", "convnext_tiny", "vit_b_16", "swin_t", "maxvit",
)  # fmt: skip


def build(name: str) -> nn.Module:
    """A torchvision model without weights."""
    if name == "maxvit":
        return torchvision.models.maxvit.MaxVit(
            (IMAGE, IMAGE), 64, 2, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2
        )
    options: dict[str, Any] = {}
    if name == "vit_b_16":
        options["image_size"] = IMAGE
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(name, weights=None, **options)


def shapes() -> dict[tuple[Any, ...], list[str]]:
    """Every distinct convolution of the zoo, with the models it occurs in."""
    found: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in MODELS:
        model = build(name).eval().to("meta")

        def note(module: nn.Conv2d, args: Any, output: Any, name: str = name) -> None:
            key = (
                *args[0].shape[1:], output.shape[1], module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups,
            )  # fmt: skip
            if name not in found[key]:
                found[key].append(name)

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, IMAGE, IMAGE, device="meta"))
    return found


def seconds(call: Any, best: float) -> float:
    """Fastest of at least three runs and 30 ms, after one to warm up; a slow route is run twice."""
    shortest, spent, runs = math.inf, 0.0, 0
    while runs < 4 or spent < 0.03:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        runs, spent = runs + 1, spent + took
        shortest = min(shortest, took)
        if runs == 2 and shortest > SLOW * best:
            break
    return shortest


def measure(key: tuple[Any, ...]) -> dict[str, Any]:
    """All routes on one shape."""
    channels, height, width, outputs, kernel, stride, padding, dilation, groups = key
    torch.manual_seed(0)
    a = torch.randn(BATCH, channels, height, width)
    with torch.device("meta"):
        like = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups)(a.to("meta"))
    g = torch.randn(like.shape)
    p = canonical(a, g.unsqueeze(0), kernel, stride, padding, dilation, groups, False)
    shape = shape_of(p)
    predicted = {route: cost.seconds(route, shape) for route in cost.candidates(shape)}
    picked = cost.choose_route(shape)
    measured: dict[str, float] = {}
    for route in sorted(predicted, key=lambda r: predicted[r]):
        if predicted[route] > HOPELESS * predicted[picked]:
            continue
        best = min(measured.values(), default=math.inf)
        measured[route] = seconds(
            lambda r=route: conv_sqnorm(a, g, kernel, stride, padding, dilation, groups, route=r), best
        )
    return {"shape": key, "picked": picked, "measured": measured}


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """Pick and prediction by the present cost model, from stored measurements."""
    channels, height, width, outputs, kernel, stride, padding, dilation, groups = row["shape"]
    a, g = torch.empty(BATCH, channels, height, width, device="meta"), None
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, device="meta")
    g = conv(a).unsqueeze(0)
    shape = shape_of(canonical(a, g, kernel, stride, padding, dilation, groups, False))
    measured = row["measured"]
    best = min(measured, key=measured.__getitem__)
    picked = cost.choose_route(shape)
    return {
        "shape": f"{channels} to {outputs}, {height}x{width}, kernel {'x'.join(map(str, kernel))}, "
        f"stride {stride[0]}" + (f", groups {groups}" if groups > 1 else ""),
        "models": ", ".join(row["models"]),
        "picked": picked,
        "predicted_ms": 1e3 * cost.seconds(picked, shape),
        "measured_ms": 1e3 * measured[picked] if picked in measured else None,
        "best": best,
        "best_ms": 1e3 * measured[best],
        "ratio": measured[picked] / measured[best] if picked in measured else math.inf,
        **{f"{route}_ms": 1e3 * t for route, t in measured.items()},
    }


def report(raw: list[dict[str, Any]]) -> None:
    """Write the table."""
    rows = sorted((judge(row) for row in raw), key=lambda row: -row["ratio"])
    pages.save("conv-routes", rows, packages=("torch", "torchvision"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", help="i/n: measure the i-th of n parts")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--raw", type=Path, default=Path(tempfile.gettempdir()) / "conv-routes-raw.json")
    options = parser.parse_args()
    raw = json.loads(options.raw.read_text()) if options.raw.exists() else []
    if options.slice:
        i, n = map(int, options.slice.split("/"))
        known = options.raw.with_suffix(".shapes.json")
        if not known.exists():
            known.write_text(json.dumps(list(shapes().items())))
        for key, models in json.loads(known.read_text())[i::n]:
            raw.append({**measure(key), "models": models})
        raw = list({json.dumps(row["shape"]): row for row in raw}.values())  # the latest of each shape
        options.raw.write_text(json.dumps(raw))
        print(len(raw), "shapes measured")
    if options.report:
        report(raw)


if __name__ == "__main__":
    main()
