"""The exported file against the live model: equality, latency, throughput, and what uncertainty costs.

``python -m bench.deploy.export --data DIR --networks resnet18`` trains or fits the network on CIFAR-10
(`bench.paper.data.sets` says where it looks), compiles and measures; networks and compiled files are kept in
``--cache`` and taken from there the next time. In one process and interleaved: the plain network compiled in the same
way (the floor), the exported two-stage model with the whole network and with the last layer only, and the live modules;
and the same as ONNX files in ONNX Runtime, each compared with the live module before it is timed.

``--weights random`` takes untrained networks and smooth noise: the worst case for equality, since all images then
give nearly the same features and the detector magnifies what little they differ in.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.deploy.networks import Images, network
from bench.harness import results_file
from fastgrad.deploy import onnx_file
from fastgrad.deploy.export import compile_function, export
from fastgrad.deploy.package import ModelPackage
from fastgrad.two_stage import TwoStageModel


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain network as a function."""
    return lambda x: net(x).detach()


#: What the detector of each form reads.
FORMS = {
    "default": ("logits", "features", "activations", "image"),
    "signals": ("gradients", "logits", "features", "image"),
    "last_layer": ("contrasts", "logits", "features", "image"),
}


def fitted(net: nn.Module, images: Images, form: str, samples: int) -> TwoStageModel:
    x = images.held_out(samples)
    loader = [(x[i : i + 16],) for i in range(0, samples, 16)]
    model = TwoStageModel(net, blocks=FORMS[form]).fit(loader, ())
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


#: Runs a file with PyTorch alone.
BARE = """
import sys
for name in ("fastgrad", "sklearn"):
    sys.modules[name] = None
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
batches = torch.load(sys.argv[2])
torch.save([tuple(model(x)) for x in batches], sys.argv[3])
"""


def equality(live: nn.Module, file: Path, images: Images, batches: list[int]) -> dict[str, float]:
    """Largest absolute difference from the live model of what a process without fastgrad computes."""
    worst: dict[str, float] = {"logits": 0.0, "probabilities": 0.0, "uncertainty": 0.0, "at": 0.0}
    inputs = [images(batch, seed=3 + i) for i, batch in enumerate(batches)]
    with tempfile.TemporaryDirectory() as folder:
        x, out = Path(folder) / "x.pt", Path(folder) / "out.pt"
        torch.save(inputs, x)
        subprocess.run([sys.executable, "-c", BARE, str(file), str(x), str(out)], cwd=folder, check=True)
        outputs = torch.load(out)
    for x, ours in zip(inputs, outputs, strict=True):
        theirs = live(x)
        for name, one, other in zip(worst, ours, theirs, strict=False):
            worst[name] = max(worst[name], difference(one, other))
        worst["at"] = max(worst["at"], float(theirs.uncertainty.max()))
    # How far the live model is from itself when the same images come one by one: the rounding of float32 sums.
    alone = torch.cat([live(row[None]).uncertainty for row in x])
    worst["live"] = difference(theirs.uncertainty, alone)
    return worst


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def prepared(
    net: nn.Module, images: Images, gradients: str, stem: Path, samples: int, *, native: bool
) -> tuple[TwoStageModel, Path]:
    """The fitted two-stage model and its exported file, from the cache or made now."""
    example = images(2, seed=0)
    saved, file = (stem.with_name(f"{stem.name}-{gradients}{end}") for end in (".safetensors", ".pt2"))
    if saved.exists():
        live = TwoStageModel.load(saved, net).eval()
    else:
        live = fitted(net, images, gradients, samples)
        live.save(saved)
    if native and not file.exists():
        start = time.perf_counter()
        export(live, example, file)
        print(f"{stem.name} {gradients}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return live, file


def onnx_cases(
    net: nn.Module, images: Images, ready: Mapping[str, tuple[TwoStageModel, Path]], stem: Path
) -> dict[str, Callable[[Tensor], Any]]:
    """The plain network and the two-stage models in ONNX Runtime; each file is compared with what it was made from."""
    example = images(8, seed=4)
    plain = stem.with_name(f"{stem.name}-plain.onnx")
    if not plain.exists():
        model = onnx_file.convert(logits_of(net), example, outputs=("logits",))
        plain.write_bytes(model.SerializeToString())
    cases: dict[str, Callable[[Tensor], Any]] = {"plain network, ONNX Runtime": onnx_file.load(plain)}
    (logits,) = cases["plain network, ONNX Runtime"](example)
    assert onnx_file.difference(logits, logits_of(net)(example)) <= 1e-5
    for form, (live, _) in ready.items():
        file = stem.with_name(f"{stem.name}-{form}.onnx")
        if not file.exists():
            export(live, example, file, tolerance=1e-4)
        cases[f"{form}, ONNX Runtime"] = ModelPackage(file)
        found = {
            name: onnx_file.difference(ours, theirs)
            for name, ours, theirs in zip(
                onnx_file.OUTPUTS, ModelPackage(file)(example), live(example), strict=True
            )
        }
        print(f"{file.name}: {found}", file=sys.stderr)
        assert max(found.values()) <= 1e-4, found
    return cases


def timed(cases: Mapping[str, Callable[[Tensor], Any]], x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """A row of times for each case, with its ratio to the exported plain network."""
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(2):  # interleaved, so that a slow minute of the machine hits all
        for case, run in cases.items():
            run(x)
            times[case] += clock(run, x, seconds / 2)
    rows = []
    for case, values in times.items():
        # Each runtime beside its own plain network.
        own = "plain network, ONNX Runtime" if "ONNX" in case else "plain network, exported"
        base = statistics.median(times[own])
        median = statistics.median(values)
        cut = statistics.quantiles(values, n=10) if len(values) > 2 else [median] * 9
        rows.append(
            {"case": case, "median_s": median, "p10_s": cut[0], "p90_s": cut[-1], "images_per_s": len(x) / median,
             "ratio": median / base}
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_b_16"])
    parser.add_argument("--gradients", nargs="+", default=["default", "signals", "last_layer"])
    parser.add_argument("--runtimes", nargs="+", choices=["pt2", "onnx"], default=["pt2", "onnx"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--check", nargs="+", type=int, default=[1, 3, 64])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--weights", choices=["trained", "random"], default="trained")
    parser.add_argument(
        "--data", type=Path, default=Path.home() / ".cache" / "fastgrad-data", help="CIFAR-10"
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fastgrad-bench")
    parser.add_argument("--step", choices=["compile", "measure", "all"], default="all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    images = Images(args.data if args.weights == "trained" else None, 224)
    for name in args.networks:
        net = network(name, images, args.cache)
        stem = args.cache / (name if args.weights == "trained" else f"{name}-random")
        plain = stem.with_name(f"{stem.name}-plain.pt2")
        native = "pt2" in args.runtimes
        if native and not plain.exists():
            compile_function(logits_of(net), images(2, seed=0), plain)
        ready = {g: prepared(net, images, g, stem, args.samples, native=native) for g in args.gradients}
        if args.step == "compile":
            for gradients, (live, file) in ready.items():
                row = {
                    "kind": "equality", "network": name, "weights": args.weights, "gradients": gradients,
                    "batches": args.check, **equality(live, file, images, args.check),
                }  # fmt: skip
                print(row, flush=True)
                results_file.append(args.cache / "equality.json", row)
            continue
        cases: dict[str, Callable[[Tensor], Any]] = {}
        if native:
            cases["plain network, exported"] = torch._inductor.aoti_load_package(str(plain))
            for gradients, (live, file) in ready.items():
                cases |= {f"{gradients}, exported": ModelPackage(file), f"{gradients}, live": live}
            cases["plain network, live"] = torch.no_grad()(net)
        if "onnx" in args.runtimes:
            cases |= onnx_cases(net, images, ready, stem)
        for batch in args.batches:
            for row in timed(cases, images(batch, seed=5), args.seconds):
                row = {"kind": "time", "network": name, "batch": batch, **row}
                print(row, flush=True)
                results_file.append(args.cache / "time.json", row)
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
                "Largest absolute difference between the live model's results and those of the file in a process "
                "without fastgrad, over all images of the named batch sizes. Uncertainty is -log p: 1e-5 of it is "
                "1e-5 of p, relative. *largest* is the largest uncertainty among them; *live alone* is how far the "
                "live model's uncertainties are from themselves when the images of the last batch come one by one. "
                "*trained*: on CIFAR-10, enlarged; of ViT-B/16 only the last layer. *random*: untrained and shown "
                "smooth noise, which is nearly the same to such a network.",
                results_file.table(
                    [{**row, "batches": ", ".join(map(str, row["batches"]))} for row in equal],
                    {"network": "network", "weights": "weights", "gradients": "gradients", "batches": "batch sizes",
                     "logits": "logits", "probabilities": "probabilities", "uncertainty": "uncertainty",
                     "at": "largest", "live": "live alone"},
                ),
            ),
            (
                "Latency of one batch, median (10th to 90th percentile), all in one process, interleaved; ratio to the "
                "plain network in the same runtime, exported in the same way. *default*: the blocks that one forward "
                "pass gives. *signals*: three backward passes through the whole network; "
                "*last_layer*: none. The file with *signals* works through a batch one image after another.",
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
