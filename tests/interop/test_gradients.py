"""pytorch-ood's gradient detectors beside its own implementation, on the same models and inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("pytorch_ood.detector")

from fastgrad import interop as ours

KINDS = ("GradNorm", "GradUncertainty")
#: Both compute in the dtype: sums of up to some thousand products, of both signs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 8, 2, groups=2, bias=False)]
    return nn.Sequential(*layers, nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def used_twice() -> nn.Module:
    """A weight with several positions, used twice, and a vector that no rule serves."""

    def forward(net: Any, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT * net.scale.sin()
        return net.head(net.same(F.gelu(net.same(rows))).mean(1))

    return Net(forward, same=nn.Linear(3, 3), head=nn.Linear(3, 4), scale=nn.Parameter(torch.randn(3)))


def tied() -> nn.Module:
    """An embedding whose weight is the head's."""
    table = nn.Embedding(4, 5)
    return Net(
        lambda net, x: F.linear(net.mix(net.table(x)).mean(1), net.table.weight), table=table, mix=nn.Linear(5, 5)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions": (convolutional, lambda: torch.randn(5, 3, 8, 8)),
    "a weight used twice": (used_twice, lambda: torch.randn(5, 3, 2, 2)),
    "a tied table": (tied, lambda: torch.randint(4, (5, 6))),
    "one position": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(5, 6)),
}


def close(value: Tensor, truth: Tensor) -> None:
    assert value.dtype == truth.dtype
    assert not value.requires_grad
    torch.testing.assert_close(value, truth, rtol=TOLERANCE[truth.dtype], atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_pytorch_ood(name: str, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().to(dtype).eval(), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    before = copy.deepcopy(model.state_dict())
    for chosen in (None, lambda name: name.endswith("weight")):
        detector = getattr(ours, kind)(model, param_filter=chosen, micro_batch_size=2)
        truth = getattr(theirs, kind)(model, param_filter=chosen).predict(x)
        assert isinstance(detector, getattr(theirs, kind))
        close(detector.predict(x), truth)
        with torch.no_grad():
            close(detector(x), truth)
        with torch.inference_mode():
            close(detector(x.clone()), truth)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_copied_and_confident_models(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False), torch.randn(4, 6)
    model[2].weight.mul_(50)
    truth = getattr(theirs, kind)(model).predict(x)
    detector = getattr(ours, kind)(model)
    for one in (detector, copy.deepcopy(detector)):
        close(one.fit([]).predict(x), truth)
    assert detector.predict(x[:0]).shape == (0,)


def test_temperature() -> None:
    torch.manual_seed(0)
    model, x = convolutional().eval(), torch.randn(3, 3, 8, 8)
    close(ours.GradNorm(model, temperature=3.0).predict(x), theirs.GradNorm(model, temperature=3.0).predict(x))


@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind: str) -> None:
    make, x = getattr(ours, kind), torch.randn(3, 3, 8, 8)
    with pytest.raises(ValueError, match="param_filter selects none"):
        make(convolutional().eval(), param_filter=lambda name: False).predict(x)
    with pytest.raises(ValueError, match="training mode"):
        make(convolutional()).predict(x)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor; it was list"):
        make(convolutional().eval()).predict([1])
    with pytest.raises(ValueError, match="micro_batch_size must be an integer of at least 1; it was 0"):
        make(convolutional().eval(), micro_batch_size=0).predict(x)
    with pytest.raises(AttributeError, match="no attribute 'GradNorms'"):
        ours.GradNorms  # noqa: B018
