"""``fastgrad demo``: from real digits to a detector, a table and a figure in half a minute on one CPU core."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fastgrad
from fastgrad import checks
from fastgrad.batches import bar
from fastgrad.challenges import PixelRange, fgsm
from fastgrad.detector.report import Report
from fastgrad.plots import COLOURS, score_histograms

#: Height and width of the images.
SIDE = 24
_BATCH = 50
#: Numbers of digits that train the network and fit the detector; the rest tests both.
_TRAINED, _FITTED = 900, 500


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the 1,797 digits of 8 x 8 pixels, enlarged, in random order (E. Alpaydin, C. Kaynak, UCI, 1998).

    They are grey images ``(n, 1, 24, 24)``, float32 in [0, 1], and their classes ``(n,)``, int64.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator, device="cpu")
    pixels = torch.from_numpy(data.images.astype(np.float32) / 16)[order, None]
    images = interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(data.target.astype(np.int64))[order]


def photographs(count: int) -> Tensor:
    """Return grey pieces of scikit-learn's two photographs in random order, ``(count, 1, 24, 24)`` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    grey = torch.from_numpy(np.stack(load_sample_images().images).astype(np.float32) / 255).mean(-1)
    pieces = grey.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(-1, 1, SIDE, SIDE)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0), device="cpu")[:count]]


def digit_network() -> nn.Sequential:
    """Return three convolutions with batch norm and linear layers: ``(B, 1, 24, 24)`` to logits ``(B, 10)``."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    width = 128 * (SIDE // 8) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))


def train(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, generator: torch.Generator) -> None:
    """Train in place with Adam and a one-cycle schedule; leave the network in evaluation mode."""
    steps = epochs * (len(images) // _BATCH)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in bar(range(epochs), "training the network", None):
        order = torch.randperm(len(images), generator=generator, device="cpu")
        for pick in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            loss = cross_entropy(network(images[pick]), labels[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval()


Method = Callable[[Tensor], NDArray[np.float64]]

DEFAULT = "fastgrad"


def methods(network: nn.Module, clean: Tensor, labels: Tensor, seed: int) -> tuple[dict[str, Method], Report]:
    """Fit fastgrad on clean images that the network was not trained on.

    Return by name a function from images to scores ``(n,)``, and the report of the fit.
    """
    two_stage = fastgrad.TwoStageModel(network, seed=seed)
    pairs = list(zip(clean.split(250), labels.split(250), strict=True))
    two_stage.fit(pairs, clip=(0.0, 1.0), verbose=None)

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        found: Tensor = network(images)
        return found.double()

    found: dict[str, Method] = {
        "softmax confidence": lambda images: -logits(images).log_softmax(-1).amax(-1).numpy(),
        "energy": lambda images: -logits(images).logsumexp(-1).numpy(),
        DEFAULT: lambda images: two_stage(images).uncertainty.double().numpy(),
    }
    return found, two_stage.report()


def challenging(network: nn.Module, digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return four sets on which the network should not be trusted, ``(n, 1, 24, 24)`` in [0, 1]."""
    pixels = PixelRange.of(digits, clip=(0.0, 1.0))
    noise = 0.25 * torch.randn(digits.shape, generator=generator, device="cpu")
    return {
        "photographs": photographs(len(digits)),
        "uniform noise": torch.rand(digits.shape, generator=generator, device="cpu"),
        "noisy digits": (digits + noise).clamp(0, 1),
        "FGSM attack (0.1)": fgsm(network, digits, 0.1, generator, pixels=pixels),
    }


def draw(path: Path, scores: dict[str, NDArray[np.float64]], images: dict[str, Tensor], threshold: float) -> None:
    """Write a PNG of scores and some images of the clean digits, which come first, and of four challenging sets."""
    from matplotlib.figure import Figure

    # Two columns, so that a phone shows readable text.
    figure = Figure(figsize=(6.4, 8.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1.0), squeeze=False)[:, 0]
    top.suptitle("Uncertainty, -log p (right of the line: flagged)", fontsize=13)
    clean, *others = scores
    for axis, name in zip(top.subplots(2, 2, sharex=True).flat, others, strict=True):
        score_histograms({clean: scores[clean], name: scores[name]}, axes=axis)
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1)

    bottom.suptitle("Images and their scores (orange: flagged)", fontsize=13)
    grid = bottom.subplots(2, len(scores))
    for column, (name, values) in enumerate(scores.items()):
        grid[0, column].set_title(name.replace(" ", "\n", 1), fontsize=11)
        for axis, image, score in zip(grid[:, column], images[name], values, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            colour = COLOURS[1] if score > threshold else "black"
            axis.set_xlabel(f"{score:.1f}", fontsize=12, color=colour)
    figure.savefig(path, dpi=110)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastgrad demo``."""
    parser.add_argument("--out", type=Path, default=Path("fastgrad-demo"), help="folder to write to (fastgrad-demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training digits (8)")


def run(arguments: argparse.Namespace) -> int:
    """Train, fit, detect and report; return the exit status."""
    # A missing package is found before the work.
    import matplotlib as mpl  # noqa: F401
    import tqdm  # noqa: F401

    checks.at_least(1, epochs=arguments.epochs)
    checks.is_seed(arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        network = digit_network()
    images, labels = digits(generator)
    sizes = [_TRAINED, _FITTED, len(images) - _TRAINED - _FITTED]
    training, clean, (test, answers) = zip(images.split(sizes), labels.split(sizes), strict=True)
    train(network, *training, epochs=arguments.epochs, generator=generator)
    trained = time.perf_counter()
    with torch.no_grad():
        accuracy = (network(test).argmax(-1) == answers).double().mean().item()

    from sklearn.metrics import roc_auc_score

    scorers, report = methods(network, *clean, arguments.seed)
    challenges = challenging(network, test, generator)
    shown = {"clean digits": test, **challenges}
    scores = {name: {which: score(images) for which, images in shown.items()} for name, score in scorers.items()}
    threshold = -np.log(0.05)
    draw(out / "demo.png", scores[DEFAULT], shown, threshold)

    lines = [f"| method | {' | '.join(challenges)} | mean |", "|---|" + "---|" * (len(challenges) + 1)]
    for name, found in scores.items():
        usual, *others = found.values()
        row = [roc_auc_score(np.repeat([0, 1], [len(usual), len(o)]), np.append(usual, o)) for o in others]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*row, np.mean(row))) + " |")
    rows = "\n".join(lines)
    flagged = float((scores[DEFAULT]["clean digits"] > threshold).mean())
    text = f"""\
Network: {accuracy:.1%} of the test digits right, trained in {trained - start:.1f} s.
Detection AUROC (1 is perfect, 0.5 is chance), one seed. fastgrad was fitted on clean digits and on challenges \
generated from them, including noise and FGSM:

{rows}

At a false-alarm rate of 5 % fastgrad flags {flagged:.1%} of the clean test digits.

Features and their cost in forward passes:

```
{report}
```
{time.perf_counter() - start:.0f} s in all on {platform.processor() or platform.machine()}, \
{torch.get_num_threads()} threads.
"""
    (out / "demo.md").write_text(text, "utf-8")
    print(f"\n{text}\n{out.resolve()}")
    return 0
