"""The command ``fastgrad demo``."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastgrad
from fastgrad.checks import extra
from fastgrad.commands.demo import digits, evaluate, figure
from fastgrad.commands.demo.network import digit_network, train
from fastgrad.metrics import auroc

# Used at the end and on the way: to be missed before the work, not after it.
with extra("demo"):
    import matplotlib as mpl  # noqa: F401
    import tqdm  # noqa: F401

#: Digits that the network is trained on, and those after them that the detectors are fitted on; the rest tests both.
_TRAINED, _FITTED = 900, 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastgrad demo``."""
    parser.add_argument("--out", type=Path, default=Path("fastgrad-demo"), help="folder for everything it writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training digits")


def run(arguments: argparse.Namespace) -> int:
    """Train, extract, detect and report; returns the exit status."""
    if arguments.epochs < 1:
        raise ValueError(f"--epochs must be at least 1; it was {arguments.epochs}")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        network = digit_network()
    data = digits.digits(generator)
    train(network, data.part(0, _TRAINED), epochs=arguments.epochs, generator=generator)
    trained = time.perf_counter()
    test = data.part(_TRAINED + _FITTED)
    with torch.no_grad():
        accuracy = (network(test.images).argmax(-1) == test.labels).double().mean().item()

    clean = data.part(_TRAINED, _TRAINED + _FITTED)
    methods, report = evaluate.methods(network, clean, arguments.seed)
    photographs = digits.photographs(len(test.images))
    challenges = evaluate.challenging(network, test.images, photographs, generator)
    shown = {"clean digits": test.images, **challenges}
    table: dict[str, dict[str, float]] = {}
    for name, score in methods.items():
        scores = {challenge: score(images) for challenge, images in shown.items()}
        usual = scores["clean digits"]
        table[name] = {challenge: auroc(usual, scores[challenge]) for challenge in challenges}
    # The loop ends with the default, whose scores the figure shows.
    assert name == evaluate.DEFAULT
    threshold = -np.log(0.05)
    figure.draw(out / "demo.png", scores, shown, threshold)

    gains = {c: table[evaluate.WHOLE_NETWORK][c] - table[evaluate.LAST_LAYER][c] for c in challenges}
    record = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"fastgrad": fastgrad.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seed": arguments.seed,
        "test_accuracy": accuracy,
        "auroc": table,
        "whole_network_adds": gains,
        "clean_flagged_at_5_percent": float((usual > threshold).mean()),
        "training_s": trained - start,
        "blocks": str(report),
        "total_s": time.perf_counter() - start,
    }
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(record)
    (out / "demo.md").write_text(text)
    print(f"\n{text}\n{out.resolve()}")
    return 0


def markdown(record: dict[str, Any]) -> str:
    """The report as Markdown, from the demo's own record."""
    table, gains = record["auroc"], record["whole_network_adds"]
    challenges = list(gains)
    lines = [
        f"Network: {record['test_accuracy']:.1%} of the test digits right, trained in {record['training_s']:.1f} s.",
        "Detection AUROC (1 is perfect, 0.5 is chance), one seed. All methods were fitted on clean digits; fastgrad "
        "generates challenges from them, including noise and FGSM:",
        "",
        "| method | " + " | ".join(challenges) + " | mean |",
        "|---|" + "---|" * (len(challenges) + 1),
    ]
    for name, row in table.items():
        cells = [f"{row[c]:.3f}" for c in challenges]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {np.mean(list(row.values())):.3f} |")
    lines += [
        "",
        "AUROC gain of the whole network's gradients over its last layer's: "
        + ", ".join(f"{c} {gain:+.3f}" for c, gain in gains.items())
        + ".",
        f"At a false-alarm rate of 5 % fastgrad flags "
        f"{record['clean_flagged_at_5_percent']:.1%} of the clean test digits.",
        "",
        "Features and their cost in forward passes:",
        "",
        "```",
        str(record["blocks"]),
        "```",
        f"{record['total_s']:.0f} s in all on {record['machine']}.",
        "",
    ]
    return "\n".join(lines)
