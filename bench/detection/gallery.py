"""The figures of the gallery."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn

from bench.detection.methods_ours import answer, fitted, log_norms
from bench.detection.networks import small
from bench.detection.registry import Options
from bench.detection.subject import Fit, Subject
from fastgrad import TwoStageModel, plots
from fastgrad.detector.price import DEFAULT_BLOCKS


def histograms(subject: Subject, out: Path) -> None:
    """Draw the scores of the default detector on clean and challenging images."""
    two_stage = fitted(Fit(subject), DEFAULT_BLOCKS)
    shown = {
        "clean test images": "clean", "PGD": "PGD", "FGSM": "FGSM", "textures": "textures",
        "Gaussian noise": "gaussian_noise", "contrast": "contrast",
    }  # fmt: skip
    found = {title: answer(two_stage, subject.seen(case)).uncertainty.numpy() for title, case in shown.items()}
    plots.save(plots.score_histograms(found), out / "gallery-scores.png", dpi=90)


def layers(subject: Subject, out: Path) -> None:
    """Draw squared norms of every parameter's gradient for the confounding label, clean against challenging."""
    shown = {case: log_norms(subject.seen(case)).double() for case in ("clean", "PGD", "textures", "grey")}
    names = [name for name, _ in subject.model.named_parameters()]
    axes = plots.layer_norms({case: norms.exp() for case, norms in shown.items()}, names)
    plots.save(axes, out / "gallery-layers.png", dpi=90)


def moons(seed: int) -> tuple[Tensor, Tensor]:
    points, labels = make_moons(1200, noise=0.1, random_state=seed)
    return torch.from_numpy(points).float(), torch.from_numpy(labels)


def manifold(out: Path) -> None:
    """Draw where the softmax of a 2-D classifier is unsure, and where the detector is."""
    torch.manual_seed(0)
    points, labels = moons(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    two_stage = TwoStageModel(model.eval()).fit([moons(1)[0]], None)
    shown, classes = points[:300], labels[:300]
    above, below = Figure(figsize=(4.6, 7.4), layout="constrained").subplots(2, 1)
    plots.manifold(
        lambda x: 1 - model(x).softmax(1).amax(1).detach(), shown, classes, title="1 - largest softmax probability",
        axes=above,
    )  # fmt: skip
    plots.manifold(
        lambda x: two_stage(x).uncertainty.clamp(max=15), shown, classes, axes=below,
        title="fastgrad, fitted on clean points alone",
    )  # fmt: skip
    plots.save(below, out / "gallery-manifold.png", dpi=80)


def draw(options: Options, out: Path) -> None:
    """Draw all figures; the network is always one of quick mode."""
    out.mkdir(parents=True, exist_ok=True)
    manifold(out)
    subject = small("resnet20", options._replace(quick=True), 0)
    histograms(subject, out)
    layers(subject, out)
