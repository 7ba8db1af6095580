"""The exported file against the live model: equality, latency, throughput, and what uncertainty costs.

``python -m bench.deploy.export --data DIR --cache CACHE --networks resnet18`` makes or fits the network
(`bench.deploy.networks`), compiles and measures; networks and files are kept in ``--cache`` and taken from there the
next time. In one process and interleaved: the plain network and the two-stage models with the blocks of `FORMS`,
compiled by AOTInductor in the same way; and the same as ONNX files in ONNX Runtime. Each file is compared with what it
was made from before it is timed. What the live modules cost says `bench.deploy.price`.

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

from bench import results_file
from bench.deploy.networks import NETWORKS, Images, images_of, network
from bench.report import pages
from fastgrad.deploy.file import onnx_export, onnx_file
from fastgrad.deploy.file.export import compile_function, export
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.detector.model import TwoStageModel
from fastgrad.detector.presets import DEFAULT_BLOCKS as USUAL

Cases = dict[str, Callable[[Tensor], Any]]


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain network as a function."""
    return lambda x: net(x).detach()


#: What the detector of each form reads beside `USUAL`, what the default budget keeps of most networks.
FORMS = {"default": (), "all parameters": ("gradients",)}
#: Where a file comes from, by its suffix.
RUNTIMES = {"pt2": "AOTInductor", "onnx": "ONNX Runtime"}
#: What a file may differ by to be timed, relative, with the default blocks: a runtime has sums of its own, which the
#: detector magnifies where only the last layer was fitted.
_APART = {"resnet18": 1e-4, "efficientnet_lite0": 1e-4}
_LAST_LAYER = 1e-2
#: With gradients, of which rounding at the kink of a ReLU opens or closes a path; the table says by how much.
_KINK = 1e-2


def allowed(stem: Path, form: str) -> float:
    """The bound of a file."""
    return _KINK if FORMS.get(form) else _APART.get(stem.name, _LAST_LAYER)


def fitted(net: nn.Module, images: Images, form: str, samples: int) -> TwoStageModel:
    """The two-stage model of a form, on clean images alone."""
    x = images.held_out(samples)
    loader = [(x[i : i + 16],) for i in range(0, samples, 16)]
    return TwoStageModel(net, blocks=(*USUAL, *FORMS[form])).fit(loader, None)


def clock(run: Callable[[Tensor], Any], x: Tensor, seconds: float) -> list[float]:
    """Seconds of each run, as many as fit."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
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


def alone(file: Path, inputs: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """What a file answers, a compiled one in a process without fastgrad."""
    if file.suffix == ".onnx":
        run = onnx_file.load(file)
        return [tuple(run(x)) for x in inputs]
    with tempfile.TemporaryDirectory() as folder:
        x, out = Path(folder) / "x.pt", Path(folder) / "out.pt"
        torch.save(inputs, x)
        subprocess.run([sys.executable, "-c", BARE, str(file), str(x), str(out)], cwd=folder, check=True)
        answers: list[tuple[Tensor, ...]] = torch.load(out)
    return answers


def equality(live: nn.Module, file: Path, images: Images, batches: list[int]) -> dict[str, float]:
    """Largest absolute difference of a file's answers from the live model's."""
    worst: dict[str, float] = {"logits": 0.0, "probabilities": 0.0, "uncertainty": 0.0, "at": 0.0}
    inputs = [images(batch, seed=3 + i) for i, batch in enumerate(batches)]
    for x, ours in zip(inputs, alone(file, inputs), strict=True):
        theirs = live(x)
        for name, one, other in zip(worst, ours, theirs, strict=False):
            worst[name] = max(worst[name], difference(one, other))
        worst["at"] = max(worst["at"], float(theirs.uncertainty.max()))
    # How far the live model is from itself when the same images come one by one: the rounding of float32 sums.
    single = torch.cat([live(row[None]).uncertainty for row in x])
    worst["live"] = difference(theirs.uncertainty, single)
    return worst


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def prepared(net: nn.Module, images: Images, form: str, stem: Path, samples: int) -> TwoStageModel:
    """The fitted two-stage model, from the cache or made now."""
    saved = _file(stem, form, "safetensors")
    if saved.exists():
        return TwoStageModel.load(saved, net)
    live = fitted(net, images, form, samples)
    live.save(saved)
    return live


def _file(stem: Path, form: str, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}-{form.replace(' ', '-')}.{suffix}")


def write_plain(net: nn.Module, example: Tensor, file: Path) -> None:
    """The network alone, compiled or translated in the same way."""
    if file.suffix == ".pt2":
        compile_function(logits_of(net), example, file)
    else:
        file.write_bytes(
            onnx_export.convert(logits_of(net), example, outputs=("logits",)).SerializeToString()
        )


def write(live: TwoStageModel, example: Tensor, file: Path, tolerance: float) -> None:
    """The exported file, unless it is there."""
    if not file.exists():
        start = time.perf_counter()
        export(live, example, file, tolerance=tolerance)
        print(f"{file.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def cases_of(
    net: nn.Module, ready: Mapping[str, TwoStageModel], stem: Path, suffix: str, example: Tensor
) -> Cases:
    """The plain network and the two-stage models in one runtime, each compared with what it was made from."""
    file = _file(stem, "plain", suffix)
    plain = torch._inductor.aoti_load_package(str(file)) if suffix == "pt2" else onnx_file.load(file)
    cases: Cases = {"plain": plain} | {form: ModelPackage(_file(stem, form, suffix)) for form in ready}
    for case, run in cases.items():
        ours, theirs = run(example), ready[case](example) if case in ready else logits_of(net)(example)
        # The plain network's answer is one tensor, or a list of one.
        pairs = zip(
            *((value,) if isinstance(value, Tensor) else tuple(value) for value in (ours, theirs)),
            strict=True,
        )
        found = max(onnx_export.difference(one, other) for one, other in pairs)
        assert found <= allowed(stem, case), (file.name, case, found)
    return cases


def timed(
    cases: Cases, prices: Mapping[str, float], x: Tensor, seconds: float, limit: float
) -> list[dict[str, Any]]:
    """A row of times for each case, with its ratio to the plain network in the same runtime.

    Args:
        cases: Of one runtime, the plain network first.
        prices: Predicted, in forward passes.
        x: The batch.
        seconds: Of timing, for each case.
        limit: A case of which one run is predicted to take more seconds is left out.
    """
    cases["plain"](x)
    once = min(clock(cases["plain"], x, 0) + clock(cases["plain"], x, 0))
    cases = {case: run for case, run in cases.items() if once * prices.get(case, 1.0) <= limit}
    times: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(4):  # interleaved, so that a slow minute of the machine hits all
        for case, run in cases.items():
            if not turn:
                run(x)
            times[case] += clock(run, x, seconds / 4)
    base = statistics.median(times["plain"])
    rows = []
    for case, values in times.items():
        cut, median = statistics.quantiles(values, n=10), statistics.median(values)
        rows.append(
            {"case": case, "median_s": median, "p10_s": cut[0], "p90_s": cut[-1], "images_per_s": len(x) / median,
             "ratio": median / base}
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument(
        "--check", nargs="+", type=int, default=[1, 3, 17], help="batches compared with the live model"
    )
    parser.add_argument("--samples", type=int, default=160, help="that the detector is fitted on")
    parser.add_argument("--weights", choices=["trained", "random"], default="trained")
    parser.add_argument(
        "--data", type=Path, help="folder with CIFAR-10 and the photographs; needed unless random"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, a case")
    parser.add_argument(
        "--limit", type=float, default=30.0, help="leave out cases of which one run takes longer"
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--step", choices=["compile", "measure", "all"], default="all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    root = args.data if args.weights == "trained" else None
    for name in args.networks:
        images = images_of(name, root)
        net = network(name, images, args.cache)
        stem = args.cache / (name if root else f"{name}-random")
        ready = {form: prepared(net, images, form, stem, args.samples) for form in args.forms}
        for suffix in () if args.step == "measure" else args.runtimes:
            example = images(2 if suffix == "pt2" else 8, seed=4)
            if not _file(stem, "plain", suffix).exists():
                write_plain(net, example, _file(stem, "plain", suffix))
            for form, live in ready.items():
                file = _file(stem, form, suffix)
                write(live, example, file, allowed(stem, form))
                row = {
                    "kind": "equality", "network": name, "weights": args.weights, "form": form,
                    "runtime": RUNTIMES[suffix], "batches": args.check,
                    **equality(live, file, images, args.check),
                }  # fmt: skip
                print(row, flush=True)
                results_file.append(args.cache / "equality.json", row)
        if args.step == "compile":
            continue
        runtimes = {
            RUNTIMES[suffix]: cases_of(net, ready, stem, suffix, images(8, seed=4))
            for suffix in args.runtimes
        }
        prices = {form: live.report().price.predicted for form, live in ready.items()}
        for batch in args.batches:
            x = images(batch, seed=5)
            for runtime, cases in runtimes.items():
                for row in timed(cases, prices, x, args.seconds, args.limit):
                    row = {"kind": "time", "network": name, "runtime": runtime, "batch": batch, **row}
                    print(row, flush=True)
                    results_file.append(args.cache / "time.json", row)
    if args.step != "compile":
        report(args.cache, args.out)


def report(cache: Path, out: Path | None) -> None:
    """Write the tables from all that was measured into the cache."""
    equal, times = results_file.load(cache / "equality.json"), results_file.load(cache / "time.json")
    for row in times:
        row["ms"] = f"{1e3 * row['median_s']:.1f} ({1e3 * row['p10_s']:.1f} to {1e3 * row['p90_s']:.1f})"
    packages = ("torch", "onnxruntime", "torchvision", "numpy")
    pages.save("export", equal + times, packages=packages, folder=out)


if __name__ == "__main__":
    main()
