"""The exported file against the live model: equality, latency, throughput, and what uncertainty costs.

``python -m bench.deploy.export --data DIR --cache CACHE --networks resnet18`` makes or fits the network, compiles and
measures. Networks are kept in ``--cache``, and files are made anew there. One process times in turns the plain network
and the two-stage model with the default blocks, compiled by AOTInductor in the same way. Then it times the same as ONNX
files in ONNX Runtime. `export` compares each file with its live model before the file appears.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms.functional import normalize

from bench.clock import deciles, in_turns, seconds
from bench.deploy.serve_load import Plain
from bench.detection import cache
from bench.detection.data import photographs, sets
from bench.detection.train import accuracy, fit
from bench.report import pages
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.detector.model import TwoStageModel

#: Returns test images ``(n, 3, 224, 224)``, given their number and the first one's place.
Images = Callable[[int, int], Tensor]
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
NETWORKS = ("resnet18", "resnet50", "efficientnet_lite0", "vit_b_16")
#: Clean images to fit a detector on.
FITTED_ON = 160
#: The runtime of a file, by its suffix.
RUNTIMES = {"pt2": "AOTInductor", "onnx": "ONNX Runtime"}
#: Batch sizes in which a file is compared with the live model, batch sizes that are timed, and seconds for each.
CHECKED, BATCHES, SECONDS = (1, 3, 17), (1, 8, 32), 12


def photographed(root: Path, count: int, start: int) -> Tensor:
    """Return photographs, pixels in [0, 1], in random order; a negative ``start`` counts from the end."""
    images = photographs.photographs(root).images
    order = np.roll(np.random.default_rng(0).permutation(len(images)), -start)
    return sets.to_tensor(images[order[:count]]).contiguous()


def small(root: Path, part: str, count: int, start: int = 0, size: int = 224) -> tuple[Tensor, Tensor]:
    """Return images of CIFAR-10, normalized and enlarged, and their labels."""
    pixels, labels = sets.load(root, "cifar10", part, count, start).labelled()
    enlarged = nn.functional.interpolate(normalize(pixels, MEAN, STD), (size, size), mode="bilinear")
    # In another memory layout the live model would sum in another order.
    return enlarged.contiguous(), labels


def network(name: str, root: Path, folder: Path) -> tuple[nn.Module, Images, Tensor]:
    """Return a network, its test images, and clean ones that it was not trained on.

    The weights are published ones, or fitted to CIFAR-10 and kept in ``folder``.
    """
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        images = partial(photographed, root)
        return photographs.network(), images, images(FITTED_ON, -FITTED_ON)

    def learn(net: Any) -> None:
        if name == "resnet18":
            fit(net, *small(root, "train", 30000, size=64), epochs=2, seed=0, batch=96, rate=0.08)
            fit(net, *small(root, "train", 2000), epochs=1, seed=0, batch=32, rate=0.03)
        else:
            x, y = small(root, "train", 400)
            for part in x[:64].split(16):  # running statistics that fit the images
                net.train()(part)
            fit_head(net.eval(), list(net.modules())[-1], x, y)
        print(f"{name}: accuracy {accuracy(net.eval(), *small(root, 'test', 128)):.2f}", file=sys.stderr)

    net = get_model(name, num_classes=10)
    net = cache.weights(folder / f"{name}.pt", net, {"network": name, "set": "cifar10"}, learn)
    return net, lambda count, start: small(root, "test", count, start)[0], small(root, "train", FITTED_ON, -5000)[0]


@torch.no_grad()
def fit_head(net: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Fit the head by ridge regression of the labels on an untrained network's features; logits have deviation 3.

    The ridge is stronger than the features' variance. This keeps directions in which images hardly differ, and mostly
    by rounding, out of the logits, as in a trained network.
    """
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        for part in x.split(8):
            net(part)
    features = torch.cat(seen).double().numpy()
    ridge = Ridge(10 * len(features) * features.var(0).mean())
    weight = ridge.fit(features, nn.functional.one_hot(y, head.out_features).numpy()).coef_
    mean = features.mean(0)
    weight = weight * 3 / ((features - mean) @ weight.T).std(ddof=1)
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(-weight @ mean))


def equality(live: TwoStageModel, run: ModelPackage, images: Images) -> dict[str, float]:
    """Return the largest differences between a file's answers and the live model's, and the largest uncertainty."""
    worst = {"logits": 0.0, "probabilities": 0.0, "uncertainty": 0.0, "at": 0.0}
    for i, batch in enumerate(CHECKED):
        x = images(batch, 150 + 50 * i)
        ours, theirs = run(x), live(x)
        for name in ("logits", "probabilities", "uncertainty"):
            worst[name] = max(worst[name], float((getattr(ours, name) - getattr(theirs, name)).abs().max()))
        worst["at"] = max(worst["at"], float(theirs.uncertainty.max()))
    # How much the live model's answers change when the same images come one by one: the rounding of float32 sums.
    single = torch.cat([live(row[None]).uncertainty for row in x])
    return worst | {"live": float((theirs.uncertainty - single).abs().max())}


def timed(runs: Mapping[str, ModelPackage], x: Tensor, least: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Yield a row of times for each case, interleaved, with its ratio to the plain network in the same runtime."""
    measures = [partial(seconds, partial(run, x), clock=time.perf_counter) for run in runs.values()]
    once = sum(times[0] for times in in_turns(measures, 1))
    taken = dict(zip(runs, in_turns(measures, max(4, round(least / once))), strict=True))
    for case, times in taken.items():
        median, low, high = deciles(times).values()
        yield {
            "case": case, "images_per_s": len(x) / median, "ratio": median / statistics.median(taken["plain"]),
            "ms": f"{1e3 * median:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
        }  # fmt: skip


def measure(name: str, data: Path, cache: Path) -> Iterator[dict[str, Any]]:
    cache.mkdir(parents=True, exist_ok=True)
    net, images, clean = network(name, data, cache)
    fitted = TwoStageModel(net, blocks=DEFAULT_BLOCKS).fit(clean.split(16), challenges=None)
    yield from compared(name, net, fitted, images, cache)


def compared(
    name: str, net: nn.Module, fitted: TwoStageModel, images: Images, folder: Path, *,
    runtimes: Mapping[str, str] = RUNTIMES, batches: Sequence[int] = BATCHES, least: float = SECONDS,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield the rows of a network and a fitted model, whose files are written to ``folder``."""
    live: dict[str, nn.Module] = {"plain": Plain(net).eval(), "default": fitted}
    for suffix, runtime in runtimes.items():
        runs = {}
        # A runtime sums in an order of its own, and the detector magnifies that if only the last layer was fitted.
        allowed = 1e-4 if name in ("resnet18", "efficientnet_lite0") else 1e-2
        for case, model in live.items():
            file = folder / f"{name}-{case.replace(' ', '-')}.{suffix}"
            example = images(2 if suffix == "pt2" else 8, 200)
            runs[case] = ModelPackage(export(model, example, file, tolerance=allowed))
            if isinstance(model, TwoStageModel):
                yield {
                    "kind": "equality", "network": name, "form": case, "runtime": runtime, "batches": CHECKED,
                    **equality(model, runs[case], images),
                }  # fmt: skip
        for batch in batches:
            for row in timed(runs, images(batch, 250), least):
                yield {"kind": "time", "network": name, "runtime": runtime, "batch": batch, **row}


if __name__ == "__main__":
    pages.command(
        "export", __doc__, measure, NETWORKS, packages=("torch", "onnxruntime", "torchvision", "numpy"),
        data={"type": Path, "required": True, "help": "folder with CIFAR-10 and the photographs"},
        cache={"type": Path, "required": True, "help": "folder for networks and files"},
    )  # fmt: skip
