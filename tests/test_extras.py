"""What ``pip install fastgrad`` alone can do, and that a missing package is named with the extra that brings it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from python_process import run_python

from fastgrad.deploy.file import onnx_export

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXPORT = """
import fastgrad, torch
from torch import nn
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
x = torch.rand(64, 3, 2, 2)
fastgrad.export(fastgrad.TwoStageModel(model, blocks=["logits"]).fit([x], challenges=None), x[:2], "extras-test.onnx")
"""
#: Extra: the packages it brings that fastgrad imports, each with a call that needs it.
CASES = {
    "demo": {
        "matplotlib": "main(['demo'])",
        "tqdm": "import fastgrad.batches; fastgrad.batches.bar([], 'samples', True)",
    },
    "serve": {
        "PIL": "from fastgrad.deploy.file.images import decode_image; decode_image(b'', None)",
        "fastapi": "from fastgrad.deploy.serve.app import create_app",
        "pebble": "from fastgrad.deploy.serve.app import create_app",
        "prometheus_client": "from fastgrad.deploy.serve.app import create_app",
        "uvicorn": "main(['serve', 'model.pt2'])",
    },
    "score": {"pyarrow": "main(['score', 'model.pt2', 'images', '--out', 'scores'])"},
    "onnx": {"onnx": EXPORT, "onnxruntime": EXPORT, "onnxscript": EXPORT},
    "interop": {"pytorch_ood": "import fastgrad.interop; fastgrad.interop.GradNorm"},
    "cluster": {"ray": "from fastgrad.deploy.ray import deployment; deployment('model.pt2')"},
}

# Blocks packages as if they were not installed, runs code, prints what a user sees.
RUN = """
import contextlib, io, json, sys
import torch

class Hiding:
    blocked = ()
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        # No error: what is not installed is not found, and some only ask.
        return None if name.partition(".")[0] in self.blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
found = []
for blocked, code in json.loads(sys.argv[1]):
    Hiding.blocked = blocked
    for name in [n for n in sys.modules if n.partition(".")[0] in (*blocked, "fastgrad")]:
        if not name.startswith(("fastgrad.ops", "fastgrad.kernels")):
            del sys.modules[name]
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            exec("from fastgrad.commands.cli import main\\n" + code, {})
        except Exception as error:
            text.write(f"{type(error).__mro__[1].__name__}: {error}")
    found.append(text.getvalue())
print(json.dumps(found))
"""

PLAIN = """
import torch, fastgrad
from fastgrad.blocks import DEFAULT_BLOCKS
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
logits, features = fastgrad.GradientFeatures(model)(torch.rand(4, 3, 8, 8))
assert features.shape == (4, 4)
assert fastgrad.contrast_sqnorm(torch.randn(2, 3), torch.randn(2, 5)).shape == (2, 5)
two_stage = fastgrad.TwoStageModel(model, blocks=DEFAULT_BLOCKS).fit([torch.rand(64, 3, 8, 8)])
assert two_stage(torch.rand(2, 3, 8, 8)).uncertainty.shape == (2,)
assert main(["doctor"]) == 0
print("all of it ran")
"""


def _distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[>=\[;\s]", line, maxsplit=1)[0] for line in requirements}


def test_a_missing_package_is_named_and_the_others_suffice() -> None:
    cases = [
        (f"{package} is not installed; it comes with: pip install 'fastgrad[{extra}]'", [package], code)
        for extra, calls in CASES.items()
        for package, code in calls.items()
        # Where PyTorch is too old for ONNX, that comes first, and no package would help.
        if extra != "onnx" or onnx_export.TRANSLATES
    ]
    plain = _distributions(PROJECT["dependencies"])
    extras = {p for calls in CASES.values() for p in calls} | {"torchvision", "pandas", "timm", "transformers"}
    assert not {package.replace("_", "-") for package in extras} & plain
    cases.append(("all of it ran\n", [*sorted(extras), "triton"], PLAIN))
    # One process for all: importing PyTorch takes seconds.
    printed = run_python("-c", RUN, json.dumps([case[1:] for case in cases]), cwd=ROOT)
    for (message, blocked, _), found in zip(cases, json.loads(printed.splitlines()[-1]), strict=True):
        assert message in found, blocked


def test_the_extra_brings_the_package() -> None:
    for extra, calls in CASES.items():
        brought = _distributions(PROJECT["optional-dependencies"][extra])
        for package in calls:
            name = {"PIL": "pillow"}.get(package, package.replace("_", "-"))
            assert name in brought, (extra, package)


def test_every_extra_of_the_package_is_in_the_table() -> None:
    # The others serve those who work on the repository.
    assert set(CASES) == set(PROJECT["optional-dependencies"]) - {"bench", "dev", "docs", "paper", "test"}
