"""``fastgrad demo``: from real digits to a detector, what it finds and misses, in half a minute on one CPU core."""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import fastgrad
from fastgrad import checks
from fastgrad.batches import bar
from fastgrad.challenges import PixelRange, fgsm
from fastgrad.plots import COLOURS

#: Height and width of the images.
SIDE = 24
_BATCH = 50
#: Changes of `harmless` that the figure shows; the other two are flagged.
_SHOWN = ("a grey level brighter", "a grey level darker", "contrast 1 % lower", "stored as bytes")
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


class Answered(NamedTuple):
    """Images ``(n, 1, 24, 24)``, their classes ``(n,)``, -1 for none, and what a model answers, ``(n,)`` each."""

    images: Tensor
    labels: Tensor
    answers: Tensor
    uncertainty: Tensor
    risk: Tensor
    flagged: Tensor

    @classmethod
    def of(cls, two_stage: fastgrad.TwoStageModel, images: Tensor, labels: Tensor) -> Answered:
        """Return what a model answers to ``images``."""
        found = two_stage(images)
        # It was fitted with labels and has a false-alarm rate.
        assert found.risk is not None
        assert found.flagged is not None
        return cls(images, labels, found.logits.argmax(-1), found.uncertainty, found.risk, found.flagged)

    @property
    def right(self) -> Tensor:
        """Which answers are right, ``(n,)`` of bool."""
        return self.answers == self.labels


def challenging(network: nn.Module, digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return sets on which the network should not be trusted, ``(n, 1, 24, 24)`` in [0, 1]."""
    pixels = PixelRange.of(digits, clip=(0.0, 1.0))
    noise = 0.25 * torch.randn(digits.shape, generator=generator, device="cpu")
    return {
        "photographs": photographs(len(digits)),
        "uniform noise": torch.rand(digits.shape, generator=generator, device="cpu"),
        "noisy digits": (digits + noise).clamp(0, 1),
        "FGSM attack (0.1)": fgsm(network, digits, 0.1, generator, pixels=pixels),
    }


def harmless(digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the digits with changes that hardly anyone sees; the last two are often flagged nevertheless."""
    level = 1 / 255
    noise = level * (2 * torch.rand(digits.shape, generator=generator, device="cpu") - 1)
    return {
        "a grey level brighter": (digits + level).clamp(0, 1),
        "a grey level darker": (digits - level).clamp(0, 1),
        "contrast 1 % lower": 0.99 * digits,
        "stored as bytes": (digits / level).round() * level,
        "moved by a pixel": digits.roll(1, 3),
        "noise of a grey level": (digits + noise).clamp(0, 1),
    }


def draw(path: Path, sets: dict[str, Answered]) -> None:
    """Write a PNG of four answers to digits, four to challenges and four to changes that nobody sees."""
    from matplotlib.figure import Figure

    digits, mirrored = sets["digits"], sets["mirrored digits"]
    # Of each kind the first: right and not flagged, wrong and not flagged, wrong.
    fine = (digits.right & ~digits.flagged).nonzero()[:, 0].tolist()
    shown = [("a digit", digits, k) for k in fine[:2]]
    shown += [
        (f"missed: a {name}", part, _first(~part.right & ~part.flagged))
        for name, part in (("digit", digits), ("mirrored digit", mirrored))
    ]
    challenges = {
        "noise added": "noisy digits",
        "attacked": "FGSM attack (0.1)",
        "photograph": "photographs",
        "noise": "uniform noise",
    }
    shown += [(title, sets[name], _first(~sets[name].right)) for title, name in challenges.items()]
    shown += [(name, sets[name], fine[0]) for name in _SHOWN]

    # Four in a row, so that a phone shows readable text.
    figure = Figure(figsize=(7.2, 8.6), layout="constrained")
    parts = figure.subfigures(3, 1, squeeze=False)[:, 0]
    titles = ("Digits, and two errors that pass", "Challenges: flagged", "Four changes that nobody sees: not flagged")
    for row, (part, title) in enumerate(zip(parts, titles, strict=True)):
        part.suptitle(title, fontsize=13)
        for axis, (name, answered, k) in zip(part.subplots(1, 4), shown[4 * row : 4 * row + 4], strict=True):
            axis.imshow(answered.images[k, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(name, fontsize=10)
            truth, flagged = int(answered.labels[k]), bool(answered.flagged[k])
            wrong = "no digit" if truth < 0 else f"it is {truth}"
            words = [
                f"answer {int(answered.answers[k])}, {'right' if answered.right[k] else wrong}",
                f"uncertainty {answered.uncertainty[k]:.1f}",
                f"risk {answered.risk[k]:.2f}{', flagged' if flagged else ''}",
            ]
            axis.set_xlabel("\n".join(words), fontsize=10, color=COLOURS[1] if flagged else "black")
            for spine in axis.spines.values():
                spine.set(color=COLOURS[1] if flagged else "black", linewidth=3 if flagged else 1)
    # The margin, because labels of subfigures are not part of the layout.
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _first(chosen: Tensor) -> int:
    """The first that is chosen, or 0."""
    return int(chosen.int().argmax())


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
    two_stage = fastgrad.TwoStageModel(network, seed=arguments.seed)
    pairs = list(zip(clean[0].split(250), clean[1].split(250), strict=True))
    two_stage.fit(pairs, clip=(0.0, 1.0), verbose=None)
    strange = challenging(network, test, generator)
    shown = {"digits": test, **strange, "mirrored digits": test.flip(3), **harmless(test, generator)}
    none = torch.full_like(answers, -1)
    foreign = {"photographs", "uniform noise"}
    sets = {name: Answered.of(two_stage, x, none if name in foreign else answers) for name, x in shown.items()}
    draw(out / "demo.png", sets)

    lines = ["| images | right | flagged | mean risk | wrong and not flagged |", "|---|---|---|---|---|"]
    for name, part in sets.items():
        shares = (part.right, part.flagged, part.risk, ~part.right & ~part.flagged)
        lines.append(f"| {name} | " + " | ".join(f"{share.double().mean():.2f}" for share in shares) + " |")
    rows = "\n".join(lines)
    text = f"""\
Network: {float(sets["digits"].right.double().mean()):.1%} of the {len(test)} test digits right, trained in \
{trained - start:.1f} s.
Shares of {len(test)} images, one seed. The detector was fitted on {len(clean[0])} clean digits and on challenges \
generated from them, noise and FGSM among them; photographs and mirrored digits are not. It flags what lies above the \
threshold of a false-alarm rate of 5 %.

{rows}

What was fitted:

```
{two_stage.report()}
```
{time.perf_counter() - start:.0f} s in all on {platform.processor() or platform.machine()}, \
{torch.get_num_threads()} threads.
"""
    (out / "demo.md").write_text(text, "utf-8")
    print(f"\n{text}\nThe figure: {(out / 'demo.png').resolve()}")
    return 0
