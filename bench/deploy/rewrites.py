"""What each rewrite of an ONNX graph gives: the time of the file without it over that of the file with all.

``python -m bench.deploy.rewrites`` translates two-stage models of untrained networks with every rewrite, and again
without each one. ONNX Runtime runs the files in turns, on the processor's clock and one thread. The ratio is the median
over rounds. A graph that a rewrite leaves as it is has no row. The weights do not matter to the time.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from bench.clock import in_turns, rounded_ratio
from bench.deploy.price import NETWORKS as PRICED
from bench.report import pages
from fastgrad import TwoStageModel
from fastgrad.commands.demo import digit_network
from fastgrad.deploy.file import onnx_export, onnx_file, onnx_operators
from fastgrad.detector.presets import DEFAULT_BLOCKS

FORMS = {"default": (), "all parameters": ("gradients",)}
BATCHES, ROUNDS = (1, 8), 15


#: How each network is built, and the shape of its inputs.
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "EfficientNet-Lite0": (PRICED["EfficientNet-Lite0"][0], (3, 224, 224)),
    "ResNet-18": (PRICED["ResNet-18"][0], (3, 224, 224)),
    "ViT-Tiny/16": (partial(VisionTransformer, 224, 16, 12, 3, 192, 768), (3, 224, 224)),
    "the demo's network": (digit_network, (1, 24, 24)),
}


#: How to do without each.
REWRITES: Mapping[str, Callable[[], Any]] = {
    title: partial(mock.patch.object, target, name, return_value=answer)
    for title, target, name, answer in (
        ("sample_apart", onnx_export, "sample_apart", None),
        ("optimize", onnx_export, "optimize", None),
        ("step as a convolution", onnx_operators, "_is_images", False),
    )
}


def translated(model: TwoStageModel, example: Tensor, file: Path) -> bytes:
    """Write the file; return its bytes."""

    def answers(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in model(x) if value is not None)

    made = onnx_export.convert(answers, example, max_batch=64)
    file.write_bytes(content := made.SerializeToString())
    return bytes(content)


def measure(name: str) -> Iterator[dict[str, Any]]:
    """Rows of one network."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            yield from measured(name, form, Path(folder))


def measured(name: str, form: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of one network and form."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    net, generator = build().eval(), torch.Generator().manual_seed(0)
    blocks = (*DEFAULT_BLOCKS, *FORMS[form])
    loader = [torch.rand(24, *shape, generator=generator) for _ in range(2)]
    model = TwoStageModel(net, blocks=blocks).fit(loader, None, verbose=None)
    example = torch.rand(2, *shape, generator=generator)
    files = {"all": folder / "all.onnx"}
    whole = translated(model, example, files["all"])
    for rewrite, without in REWRITES.items():
        file = folder / f"{len(files)}.onnx"
        with without():
            if translated(model, example, file) != whole:
                files[rewrite] = file
    runs = {rewrite: onnx_file.load(file) for rewrite, file in files.items()}
    for batch in BATCHES:
        x = torch.rand(batch, *shape, generator=generator)
        expected = runs["all"](x)[0]
        for run in runs.values():
            # Another answer would mean that something else is timed.
            torch.testing.assert_close(run(x)[0], expected, rtol=1e-3, atol=1e-3)
        calls = {rewrite: partial(run, x) for rewrite, run in runs.items()}
        # The clock's own cost would show in one call of a small network.
        each = max(1, round(0.02 / statistics.median(in_turns({"all": calls["all"]}, 3)["all"])))
        taken = in_turns(calls, ROUNDS, each=each)
        for rewrite in list(runs)[1:]:
            yield {
                "network": name, "form": form, "batch": batch, "without": rewrite,
                "ms": round(1e3 * statistics.median(taken["all"]) / each, 2),
                **rounded_ratio(taken[rewrite], taken["all"]),
            }  # fmt: skip


if __name__ == "__main__":
    versions = ("torch", "onnx", "onnxruntime", "onnxscript")
    pages.command("onnx-rewrites", __doc__, measure, NETWORKS, packages=versions)
