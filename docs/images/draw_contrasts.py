"""Draw what a contrast's gradient norm is, as ``docs/images/contrasts.png``: ``python docs/images/draw_contrasts.py``.

The network is the demo's, trained on 900 digits; the images are of its test set and its challenges.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastgrad
from fastgrad.commands import demo

#: A digit that the network is sure of and that its attack makes doubtful; the noise is as doubtful.
DIGIT, NOISE = 4, 2
ANSWER, OTHER = "#c1121f", "#5b8db8"


def trained() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Return the demo's network, and an image ``(1, 1, 24, 24)`` by its title."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = demo.digit_network()
    images, labels = demo.digits(generator)
    demo.train(network, images[:900], labels[:900], epochs=8, generator=generator)
    test = images[1400:]
    challenges = demo.challenging(network, test, generator)
    return network, {
        "a test digit": test[DIGIT, None],
        "the same\nunder attack": challenges["FGSM attack (0.1)"][DIGIT, None],
        "noise": challenges["uniform noise"][NOISE, None],
    }


def draw() -> Figure:
    """Return a row for each image: the image, and the norm of the last layer's gradient under each label."""
    network, images = trained()
    figure = Figure(figsize=(6, 6.6), layout="constrained")
    figure.suptitle("If the right label were Q, how strongly would\nthe last layer have to change?", fontsize=14)
    panels = figure.subplots(len(images), 2, width_ratios=(1, 3.2))
    for (left, right), (title, image) in zip(panels, images.items(), strict=True):
        with torch.no_grad():
            h = network[:-1](image)
            logits = network[-1](h)
            norms = fastgrad.contrast_sqnorm(h, logits)[0]
        answer = int(logits.argmax())
        left.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
        left.set(xticks=[], yticks=[])
        left.set_xlabel(title, fontsize=12)
        shown = right.bar(range(10), norms, color=[ANSWER if k == answer else OTHER for k in range(10)])
        right.bar_label(shown, [f"{value / 1000:.1f}" for value in norms], fontsize=11)
        right.set_title(f"answer P = {answer}, probability {logits.softmax(-1).max():.2f}", fontsize=12, color=ANSWER)
        right.set(xticks=range(10), yticks=[], ylim=(0, 1.16 * float(norms.max())))
        right.tick_params(labelsize=12, length=0)
        right.spines[["top", "right", "left"]].set_visible(False)
    words = "label Q; bar: squared norm of the last layer's\ngradient, in thousands (each row has its own scale)"
    panels[-1, 1].set_xlabel(words, fontsize=12)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("contrasts.png"), dpi=100)
