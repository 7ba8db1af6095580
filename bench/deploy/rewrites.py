"""What the rewrite of ONNX graphs gains: the time of a file without it over that of the file with it.

``python -m bench.deploy.rewrites`` translates two-stage models of untrained networks with the rewrite and without. ONNX
Runtime runs the files in turns, on the processor's clock and one thread. The ratio is the median over rounds. A graph
that the rewrite leaves as it is has no row. The time does not depend on the weights.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchvision.models import VisionTransformer

from bench.clock import in_turns, rounded_ratio, seconds
from bench.deploy.price import NETWORKS as PRICED
from bench.report import pages
from fastgrad import TwoStageModel
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.commands.demo import digit_network
from fastgrad.deploy.file import onnx_export, onnx_file
from fastgrad.deploy.file.export import export

BATCHES, ROUNDS = (1, 8), 15
#: How each network is built, and the shape of its inputs.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "EfficientNet-Lite0": (PRICED["EfficientNet-Lite0"][0], (3, 224, 224)),
    "ResNet-18": (PRICED["ResNet-18"][0], (3, 224, 224)),
    "ViT-Tiny/16": (partial(VisionTransformer, 224, 16, 12, 3, 192, 768), (3, 224, 224)),
    "the demo's network": (digit_network, (1, 24, 24)),
}


def measure(name: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = TwoStageModel(build().eval(), blocks=DEFAULT_BLOCKS)
    model.fit([torch.rand(24, *shape) for _ in range(2)], challenges=None, verbose=None)
    with tempfile.TemporaryDirectory() as folder:
        # Answers are compared below; untrained networks magnify rounding beyond the usual tolerance.
        translated = partial(export, model, torch.rand(2, *shape), max_batch=64, tolerance=math.inf)
        file = translated(Path(folder, "all.onnx"))
        with mock.patch.object(onnx_export, "subsample_convs", return_value=None):
            plain = translated(Path(folder, "plain.onnx"))
        if file.read_bytes() == plain.read_bytes():
            return
        whole, without = map(onnx_file.load, (file, plain))
    for batch in BATCHES:
        x = torch.rand(batch, *shape)
        # Other answers would mean that something else is timed.
        torch.testing.assert_close(without(x)[0], whole(x)[0], rtol=1e-3, atol=1e-3)
        base, taken = in_turns([partial(seconds, partial(run, x)) for run in (whole, without)], ROUNDS, least=0.02)
        yield {
            "network": name, "batch": batch, "without": "subsample_convs",
            "ms": round(1e3 * statistics.median(base), 2),
            **rounded_ratio(taken, base),
        }  # fmt: skip


if __name__ == "__main__":
    versions = ("torch", "onnx", "onnxruntime", "onnxscript")
    pages.command("onnx-rewrites", __doc__, measure, NETWORKS, packages=versions)
