"""The exported file against the live model: equality, latency, throughput, and what uncertainty costs.

``python bench/export.py --data DIR --networks resnet18`` trains or fits the network on CIFAR-10 (`bench.paper.data`
says where it looks), compiles and measures; networks and compiled files are kept in ``--cache`` and taken from there
the next time. In one process and interleaved: the plain network compiled in the same way (the floor), the exported
two-stage model with the whole network and with the last layer only, and the live modules.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_file
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.paper import data
from fastgrad.deploy.export import compile_function, export
from fastgrad.deploy.package import ModelPackage
from fastgrad.two_stage import TwoStageModel

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Images:
    """Batches of images, prepared for the network: CIFAR-10's, or smooth noise where there is no ``root``."""

    def __init__(self, root: Path | None, size: int) -> None:
        self.root, self.size = root, size

    def __call__(self, count: int, seed: int) -> Tensor:
        """``(count, 3, size, size)``, test images from number ``50 * seed`` on."""
        if self.root is None:
            generator = torch.Generator().manual_seed(seed)
            coarse = torch.randn(count, 3, 8, 8, generator=generator)
            fine = torch.randn(count, 3, self.size, self.size, generator=generator)
            return nn.functional.interpolate(coarse, (self.size, self.size), mode="bilinear") + 0.3 * fine
        return self.prepare(data.load(self.root, "cifar10", "test", count, 50 * seed).tensor(), self.size)

    def held_out(self, count: int) -> Tensor:
        """Clean images that the network was not trained on, to fit the detector."""
        if self.root is None:
            return self(count, 1)
        return self.prepare(data.load(self.root, "cifar10", "train", count, -5000).tensor(), self.size)

    def training(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Images for `train`, still small, and their labels."""
        split = data.load(self.root, "cifar10", "train", count, 0)
        return self.prepare(split.tensor(), size), torch.from_numpy(split.labels)

    @staticmethod
    def prepare(pixels: Tensor, size: int) -> Tensor:
        """Normalized, resized, contiguous: in another memory layout the live model's sums have another order."""
        normalized = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
        return nn.functional.interpolate(normalized, (size, size), mode="bilinear").contiguous()


def network(name: str, images: Images, cache: Path) -> nn.Module:
    """A torchvision network: untrained, or made to know CIFAR-10 in some minutes on two cores."""
    import torchvision.models as models

    torch.manual_seed(0)
    build = {"resnet18": models.resnet18, "vit_b_16": models.vit_b_16}[name]
    if images.root is None:
        return build(num_classes=1000).eval()
    net = build(num_classes=10)
    file = cache / f"{name}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    start = time.perf_counter()
    if name == "vit_b_16":
        fit_head(net.eval(), net.heads[-1], *images.training(400, 224))
    else:
        train(net, *images.training(30000, 64), steps=620, batch=96, rate=0.08)
        train(net, *images.training(2000, 224), steps=60, batch=32, rate=0.03)
    x, y = images(128, seed=0), torch.from_numpy(data.load(images.root, "cifar10", "test", 128).labels)
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in x.split(16)]) == y
    print(
        f"{name}: {time.perf_counter() - start:.0f} s, accuracy {right.float().mean():.2f}", file=sys.stderr
    )
    torch.save(net.state_dict(), file)
    return net.eval()


def train(net: nn.Module, x: Tensor, y: Tensor, *, steps: int, batch: int, rate: float) -> None:
    """SGD with one cycle of the learning rate."""
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.25)
    order = torch.randperm(len(x))
    for step in range(steps):
        index = order[torch.arange(step * batch, (step + 1) * batch) % len(x)]
        images = x[index].flip(3) if step % 2 else x[index]
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), y[index]).backward()
        optimizer.step()
        schedule.step()
    net.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def fit_head(net: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Ridge regression of the labels on an untrained network's last features, scaled to logits of deviation 3.

    The ridge is stronger than the features' variance: directions in which images hardly differ, where rounding is
    a large part of what they differ in, stay out of the logits, as they do in a trained network.
    """
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in x.split(8):
        net(part)
    hook.remove()
    features = torch.cat(seen).double()
    mean = features.mean(0)
    centred = features - mean
    targets = nn.functional.one_hot(y, head.out_features).double() - 1 / head.out_features
    gram = centred.T @ centred
    ridge = 10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, centred.T @ targets).T
    weight *= 3 / (centred @ weight.T).std()
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ mean)


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain network as a function."""
    return lambda x: net(x).detach()


def fitted(net: nn.Module, images: Images, gradients: str, samples: int) -> TwoStageModel:
    x = images.held_out(samples)
    loader = [(x[i : i + 16],) for i in range(0, samples, 16)]
    model = TwoStageModel(net, gradients=gradients).fit(loader, ())
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_b_16"])
    parser.add_argument("--gradients", nargs="+", default=["signals", "last_layer"])
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
    rows: list[dict[str, Any]] = []
    images = Images(args.data if args.weights == "trained" else None, 224)
    for name in args.networks:
        net = network(name, images, args.cache)
        example = images(2, seed=0)
        stem = name if args.weights == "trained" else f"{name}-random"
        plain = args.cache / f"{stem}-plain.pt2"
        if not plain.exists():
            start = time.perf_counter()
            compile_function(logits_of(net), example, plain)
            print(f"{name} plain: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        lives, packages = {}, {}
        for gradients in args.gradients:
            saved, file = (
                args.cache / f"{stem}-{gradients}.safetensors",
                args.cache / f"{stem}-{gradients}.pt2",
            )
            if saved.exists():
                live = TwoStageModel.load(saved, net).eval()
            else:
                live = fitted(net, images, gradients, args.samples)
                live.save(saved)
            if not file.exists():
                start = time.perf_counter()
                export(live, example, file)
                print(f"{name} {gradients}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            lives[gradients], packages[gradients] = live, ModelPackage(file)
        if args.step == "compile":
            for gradients, live in lives.items():
                worst = equality(live, args.cache / f"{stem}-{gradients}.pt2", images, args.check)
                row = {
                    "kind": "equality",
                    "network": name,
                    "weights": args.weights,
                    "gradients": gradients,
                    "batches": args.check,
                    **worst,
                }
                print(row, flush=True)
                results_file.append(args.cache / "equality.json", row)
            continue
        run_plain = torch._inductor.aoti_load_package(str(plain))
        for batch in args.batches:
            x = images(batch, seed=5)
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
                "plain network compiled in the same way. *signals*: three backward passes through the whole network; "
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
