"""What each rewrite of an ONNX graph gains: the time of the file without it over that of the file with all.

``python -m bench.deploy.rewrites`` translates two-stage models of untrained networks with every rewrite, and again
without each one. ONNX Runtime runs the files in turns, on the processor's clock and one thread. The ratio is the median
over rounds. A graph that a rewrite leaves as it is has no row. The time does not depend on the weights.
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
from fastgrad.commands.demo import digit_network
from fastgrad.deploy.file import onnx_export, onnx_file, onnx_operators
from fastgrad.deploy.file.export import export
from fastgrad.detector.price import DEFAULT_BLOCKS

FORMS = {"default": (), "all parameters": ("gradients",)}
BATCHES, ROUNDS = (1, 8), 15
#: How each network is built, and the shape of its inputs.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "EfficientNet-Lite0": (PRICED["EfficientNet-Lite0"][0], (3, 224, 224)),
    "ResNet-18": (PRICED["ResNet-18"][0], (3, 224, 224)),
    "ViT-Tiny/16": (partial(VisionTransformer, 224, 16, 12, 3, 192, 768), (3, 224, 224)),
    "the demo's network": (digit_network, (1, 24, 24)),
}
#: Patches that disable each rewrite.
REWRITES: Mapping[str, Callable[[], Any]] = {
    "sample_apart": partial(mock.patch.object, onnx_export, "sample_apart", return_value=None),
    "optimize": partial(mock.patch.object, onnx_export, "optimize", return_value=None),
    "step as a convolution": partial(mock.patch.object, onnx_operators, "_is_images", return_value=False),
}


def measure(name: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for form, extra in FORMS.items():
        torch.manual_seed(0)
        build, shape = NETWORKS[name]
        model = TwoStageModel(build().eval(), blocks=(*DEFAULT_BLOCKS, *extra))
        model.fit([torch.rand(24, *shape) for _ in range(2)], None, verbose=None)
        with tempfile.TemporaryDirectory() as folder:
            # Answers are compared below; untrained networks magnify rounding beyond the usual tolerance.
            translated = partial(export, model, torch.rand(2, *shape), max_batch=64, tolerance=math.inf)
            files = {"all": translated(Path(folder, "all.onnx"))}
            for rewrite, without in REWRITES.items():
                with without():
                    file = translated(Path(folder, f"{rewrite}.onnx"))
                if file.read_bytes() != files["all"].read_bytes():
                    files[rewrite] = file
            whole, *others = map(onnx_file.load, files.values())
        for batch in BATCHES:
            x = torch.rand(batch, *shape)
            for run in others:
                # Other answers would mean that something else is timed.
                torch.testing.assert_close(run(x)[0], whole(x)[0], rtol=1e-3, atol=1e-3)
            base, *taken = in_turns([partial(seconds, partial(run, x)) for run in (whole, *others)], ROUNDS, least=0.02)
            for rewrite, times in zip(list(files)[1:], taken, strict=True):
                yield {
                    "network": name, "form": form, "batch": batch, "without": rewrite,
                    "ms": round(1e3 * statistics.median(base), 2), **rounded_ratio(times, base),
                }  # fmt: skip


if __name__ == "__main__":
    versions = ("torch", "onnx", "onnxruntime", "onnxscript")
    pages.command("onnx-rewrites", __doc__, measure, NETWORKS, packages=versions)
