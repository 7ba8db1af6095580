"""Every route on every convolution of the zoo: is the one that the cost model picks the fastest?

    python -m bench.micro.conv_routes        # bench/results/conv-routes.json and .md

The acceptance is a pick within 20 % of the measured best for at least 90 % of the shapes. A route predicted more than
`HOPELESS` times slower than the pick is not measured, and one `SLOW` times slower than the best so far is run twice.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from functools import partial
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


def measure(key: tuple[Any, ...], models: list[str]) -> dict[str, Any]:
    """Return a row: the pick, and all routes on one shape."""
    channels, height, width, outputs, kernel, stride, padding, dilation, groups = key
    torch.manual_seed(0)
    a = torch.randn(BATCH, channels, height, width)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, device="meta")
    g = torch.randn(layer(a.to("meta")).shape)
    shape = shape_of(canonical(a, g.unsqueeze(0), kernel, stride, padding, dilation, groups, False))
    predicted = {route: cost.seconds(route, shape) for route in cost.candidates(shape)}
    picked = cost.choose_route(shape)
    measured: dict[str, float] = {}
    for route in sorted(predicted, key=lambda r: predicted[r]):
        if predicted[route] <= HOPELESS * predicted[picked]:
            call = partial(conv_sqnorm, a, g, kernel, stride, padding, dilation, groups, route=route)
            measured[route] = seconds(call, min(measured.values(), default=math.inf))
    best = min(measured, key=measured.__getitem__)
    return {
        "shape": f"{channels} to {outputs}, {height}x{width}, kernel {'x'.join(map(str, kernel))}, "
        f"stride {stride[0]}" + (f", groups {groups}" if groups > 1 else ""),
        "models": ", ".join(models), "picked": picked, "predicted_ms": 1e3 * predicted[picked],
        "measured_ms": 1e3 * measured[picked], "best": best, "best_ms": 1e3 * measured[best],
        "ratio": measured[picked] / measured[best], **{f"{route}_ms": 1e3 * t for route, t in measured.items()},
    }  # fmt: skip


def main() -> None:
    """Measure every shape."""
    rows = []
    for key, models in shapes().items():
        rows.append(measure(key, models))
        print(rows[-1]["shape"], file=sys.stderr)
    pages.save("conv-routes", sorted(rows, key=lambda row: -row["ratio"]), packages=("torch", "torchvision"))


if __name__ == "__main__":
    main()
