"""PyTorch's default device and dtype are the user's: no answer depends on them."""

from __future__ import annotations

import ast
import contextlib
import copy
import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import fastgrad
from fastgrad.challenges import generate_challenges
from fastgrad.checks import without_warnings

NETWORK = nn.Sequential(
    nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
).eval()
IMAGES = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


def fitted(correct: bool) -> list[Tensor]:
    blocks: list[str] = ["logits", "activations", "image", "gradients"]
    model = fastgrad.TwoStageModel(NETWORK, blocks=blocks, seed=1)
    with without_warnings(UserWarning):  # there is nothing to correct
        model.fit([(IMAGES, LABELS)], correct=correct, verbose=False)
    return [value for value in model(IMAGES[:5]) if value is not None]


def recorded() -> list[Tensor]:
    with fastgrad.record(NETWORK):
        loss = F.cross_entropy(NETWORK(IMAGES[:5]), LABELS[:5], reduction="sum")
        return list(fastgrad.grad_sqnorm(loss, list(NETWORK.parameters())))


def clipped() -> list[Tensor]:
    model = copy.deepcopy(NETWORK)
    with fastgrad.clip_gradients(model, 0.1) as clip:
        return [clip.backward(F.cross_entropy(model(IMAGES[:5]), LABELS[:5], reduction="none"))]


def contrasts() -> list[Tensor]:
    h, z = IMAGES[:, 0, 0], IMAGES.flatten(1)[:, :300]
    return [fastgrad.contrast_sqnorm(h, z, log=log) for log in (False, True)]


def classified() -> list[Tensor]:
    h, labels = IMAGES.flatten(1)[:, :8], LABELS.numpy()
    classifier = fastgrad.IntrospectiveClassifier(max_epochs=2, hidden=(4,)).fit(h, labels)
    return [torch.from_numpy(classifier.predict_proba(h))]


WORK: dict[str, Callable[[], list[Tensor]]] = {
    "detector": lambda: fitted(False),
    "correction": lambda: fitted(True),
    "classifier": classified,
    "challenges": lambda: [batch.inputs for batch in generate_challenges(NETWORK, IMAGES[:40])],
    "features": lambda: list(fastgrad.GradientFeatures(NETWORK, target=lambda z: z.argmax(1))(IMAGES[:5])),
    "record": recorded,
    "clipping": clipped,
    "contrasts": contrasts,
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def optimizers_name_their_device() -> bool:
    """Whether PyTorch's do: those of 2.8 count steps on the default device, which is none that holds numbers here."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    with torch.device("meta"):
        try:
            torch.optim.AdamW([parameter]).step()
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize("work", WORK)
def test_defaults_of_pytorch_change_nothing(work: str) -> None:
    expected = WORK[work]()
    for device, dtype in (("meta", torch.float64), ("cpu", torch.bfloat16)):
        if work == "classifier" and not optimizers_name_their_device():
            device = "cpu"
        with torch.device(device), default_dtype(dtype):
            found = WORK[work]()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_every_new_tensor_names_its_device() -> None:
    makers = {function.__name__ for function in _device_constructors()}
    nameless = [
        f"{file}:{node.lineno}"
        for file in pathlib.Path(fastgrad.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in makers
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]
    assert nameless == []
