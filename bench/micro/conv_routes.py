"""Time every route on every convolution of the model zoo, to see whether the cost model picks the fastest.

    python -m bench.micro.conv_routes        # bench/results/conv-routes.json and .md

The pick must be within 20 % of the measured best for at least 90 % of the shapes. A route predicted more than
`HOPELESS` times slower than the pick is not measured.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import starmap
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn
from torch.utils.benchmark import Timer

from bench.report import pages
from fastgrad.ops.conv import cost, sqnorm
from fastgrad.ops.conv.geometry import Kernel, problem_of

BATCH, IMAGE, HOPELESS = 16, 64, 12.0
#: torchvision's name of each model, and its arguments except ``weights=None``.
MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {}, "densenet121": {}, "mobilenet_v3_small": {}, "efficientnet_b0": {}, "shufflenet_v2_x1_0": {},
    "googlenet": {"aux_logits": False, "init_weights": False}, "vgg11_bn": {}, "squeezenet1_1": {},
    "regnet_y_400mf": {}, "mnasnet1_0": {}, "convnext_tiny": {}, "vit_b_16": {"image_size": IMAGE}, "swin_t": {},
}  # fmt: skip


def convolutions() -> dict[tuple[Any, ...], list[str]]:
    """Return every distinct convolution of the zoo, with the models it occurs in."""
    zoo = {name: torchvision.models.get_model(name, weights=None, **options) for name, options in MODELS.items()}
    size, channels, blocks = (IMAGE, IMAGE), [64, 128, 256, 512], [2, 2, 5, 2]
    zoo["maxvit"] = torchvision.models.maxvit.MaxVit(size, 64, 2, channels, blocks, 32, 0.2)
    found: dict[tuple[Any, ...], dict[str, None]] = defaultdict(dict)
    for name, model in zoo.items():

        def note(module: nn.Conv2d, args: Any, output: Any, name: str = name) -> None:
            how = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
            found[(*args[0].shape[1:], *output.shape[1:], *how)][name] = None

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model.eval().to("meta")(torch.empty(2, 3, IMAGE, IMAGE, device="meta"))
    return {key: list(names) for key, names in found.items()}


def measured(key: tuple[Any, ...], models: list[str]) -> dict[str, Any]:
    """Return a row: the pick, and all routes on one shape."""
    channels, height, width, *out, size, stride, padding, dilation, groups = key
    kernel = Kernel(size, stride, padding, dilation, groups)
    torch.manual_seed(0)
    a, g = torch.randn(BATCH, channels, height, width), torch.randn(BATCH, *out)
    problem = problem_of(a, g.unsqueeze(0), kernel)
    predicted = {route: cost.seconds(route, problem, cost.CHUNK_BYTES) for route in cost.candidates(problem)}
    picked = cost.choose_route(problem)
    taken: dict[str, float] = {}
    for route, seconds in predicted.items():
        if seconds <= HOPELESS * predicted[picked]:
            call = partial(sqnorm.conv_sqnorm, a, g, kernel)
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            plan = route, cost.chunk_size(route, problem, cost.CHUNK_BYTES)
            with mock.patch.object(sqnorm, "plan", return_value=plan):
                taken[route] = min(timer.blocked_autorange(min_run_time=0.03).times)
    best = min(taken, key=taken.__getitem__)
    return {
        "shape": f"{channels} to {out[0]}, {height}x{width}, kernel {'x'.join(map(str, size))}, "
        f"stride {stride[0]}" + (f", groups {groups}" if groups > 1 else ""),
        "models": ", ".join(models), "picked": picked, "predicted_ms": 1e3 * predicted[picked],
        "measured_ms": 1e3 * taken[picked], "best": best, "best_ms": 1e3 * taken[best],
        "ratio": taken[picked] / taken[best], **{f"{route}_ms": 1e3 * t for route, t in taken.items()},
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    # Worst picks come first.
    return sorted(starmap(measured, convolutions().items()), key=lambda row: -row["ratio"])


if __name__ == "__main__":
    pages.command("conv-routes", __doc__, measure, packages=("torch", "torchvision"))
