"""The exported file against the live model: equality, latency, throughput, and what uncertainty costs.

``python bench/export.py --networks resnet18`` compiles and measures; compiled files are kept in ``--cache`` and taken
from there the next time. In one process and interleaved: the plain network compiled in the same way (the floor), the
exported two-stage model with the whole network and with the last layer only, and the live modules.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_file
import torch
from torch import Tensor, nn

from fastgrad.export import compile_function, export
from fastgrad.package import ModelPackage
from fastgrad.two_stage import TwoStageModel


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A torchvision network with random weights: rounding and speed do not depend on training."""
    import torchvision.models as models

    torch.manual_seed(0)
    build, size = {
        "resnet18": (models.resnet18, 224),
        "vit_b_16": (models.vit_b_16, 224),
        "squeezenet1_1": (models.squeezenet1_1, 64),
    }[name]
    return build(num_classes=1000).eval(), (3, size, size)


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain network as a function."""
    return lambda x: net(x).detach()


def images(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Smooth random images, so that samples differ as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], 8, 8, generator=generator)
    fine = torch.randn(count, *shape, generator=generator)
    return nn.functional.interpolate(coarse, shape[1:], mode="bilinear") + 0.3 * fine


def fitted(net: nn.Module, shape: tuple[int, ...], gradients: str, samples: int) -> TwoStageModel:
    x = images(samples, shape, seed=1)
    loader = [(x[i : i + 16],) for i in range(0, samples, 16)]
    model = TwoStageModel(net, gradients=gradients).fit(loader, (), calibration_loader=loader)
    model.eval()
    return model


def clock(run: Callable[[Tensor], Any], x: Tensor, seconds: float) -> list[float]:
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return times


def equality(
    live: nn.Module, package: ModelPackage, shape: tuple[int, ...], batches: list[int]
) -> dict[str, float]:
    """Largest difference from the live model, absolute or relative, whichever is smaller."""
    worst: dict[str, float] = {"logits": 0.0, "probabilities": 0.0, "uncertainty": 0.0}
    for batch in batches:
        x = images(batch, shape, seed=100 + batch)
        for name, ours, theirs in zip(worst, package(x), live(x), strict=True):
            worst[name] = max(worst[name], difference(ours, theirs))
    # How far the live model is from itself when the same images come one by one: the rounding of float32 sums.
    x = images(16, shape, seed=99)
    alone = torch.cat([live(x[i : i + 1]).uncertainty for i in range(len(x))])
    worst["live"] = difference(live(x).uncertainty, alone)
    return worst


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative where values exceed 1."""
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_b_16"])
    parser.add_argument("--gradients", nargs="+", default=["signals", "last_layer"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--check", nargs="+", type=int, default=[1, 3, 64])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fastgrad-bench")
    parser.add_argument("--step", choices=["compile", "measure", "all"], default="all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        net, shape = network(name)
        example = images(2, shape, seed=0)
        plain = args.cache / f"{name}-plain.pt2"
        if not plain.exists():
            start = time.perf_counter()
            compile_function(logits_of(net), example, plain)
            print(f"{name} plain: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        lives, packages = {}, {}
        for gradients in args.gradients:
            saved, file = (
                args.cache / f"{name}-{gradients}.safetensors",
                args.cache / f"{name}-{gradients}.pt2",
            )
            if saved.exists():
                live = TwoStageModel.load(saved, net).eval()
            else:
                live = fitted(net, shape, gradients, args.samples)
                live.save(saved)
            if not file.exists():
                start = time.perf_counter()
                export(live, example, file)
                print(f"{name} {gradients}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            lives[gradients], packages[gradients] = live, ModelPackage(file)
        if args.step == "compile":
            for gradients, live in lives.items():
                worst = equality(live, packages[gradients], shape, args.check)
                row = {
                    "kind": "equality",
                    "network": name,
                    "gradients": gradients,
                    "batches": args.check,
                    **worst,
                }
                print(row, flush=True)
                results_file.append(args.cache / "equality.json", row)
            continue
        run_plain = torch._inductor.aoti_load_package(str(plain))
        for batch in args.batches:
            x = images(batch, shape, seed=5)
            cases: dict[str, Callable[[Tensor], Any]] = {"plain network, exported": run_plain}
            for gradients in args.gradients:
                cases[f"{gradients}, exported"] = packages[gradients]
                cases[f"{gradients}, live"] = lives[gradients]
            cases["plain network, live"] = torch.no_grad()(net)
            times: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(2):  # interleaved, so that a slow minute of the machine hits all
                for case, run in cases.items():
                    run(x)
                    times[case] += clock(run, x, args.seconds / 2)
            base = statistics.median(times["plain network, exported"])
            for case, values in times.items():
                median = statistics.median(values)
                cut = statistics.quantiles(values, n=10) if len(values) > 2 else [median] * 9
                rows.append(
                    {"kind": "time", "network": name, "batch": batch, "case": case, "median_s": median,
                     "p10_s": cut[0], "p90_s": cut[-1], "images_per_s": batch / median, "ratio": median / base}
                )  # fmt: skip
                print(rows[-1], flush=True)
                results_file.append(args.cache / "time.json", rows[-1])
    if args.step != "compile":
        report(args.cache, args.out)


def report(cache: Path, out: Path | None) -> None:
    """Write the tables from all that was measured into the cache."""
    equal, timed = results_file.load(cache / "equality.json"), results_file.load(cache / "time.json")
    for row in timed:
        row["ms"] = f"{1e3 * row['median_s']:.1f} ({1e3 * row['p10_s']:.1f} to {1e3 * row['p90_s']:.1f})"
        row["rate"], row["times"] = f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}"
    results_file.write(
        "export",
        "Exported file against live model",
        equal + timed,
        [
            (
                "Largest difference between the file's results and the live model's over the named batch sizes, "
                "relative where values exceed 1. *live alone* is how far the live model's uncertainty is from itself "
                "when the images of a batch come one by one:",
                results_file.table(
                    [{**row, "batches": ", ".join(map(str, row["batches"]))} for row in equal],
                    {"network": "network", "gradients": "gradients", "batches": "batch sizes", "logits": "logits",
                     "probabilities": "probabilities", "uncertainty": "uncertainty",
                     "live": "live alone"},
                ),
            ),
            (
                "Latency of one batch, median (10th to 90th percentile), all in one process, interleaved; ratio to the "
                "plain network compiled in the same way. *signals*: three backward passes through the whole network; "
                "*last_layer*: none.",
                results_file.table(
                    timed,
                    {"network": "network", "batch": "batch", "case": "case", "ms": "ms", "rate": "images/s",
                     "times": "ratio"},
                ),
            ),
        ],
        mode="full",
        packages=("torch", "torchvision", "numpy"),
        folder=out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
