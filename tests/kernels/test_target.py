"""Squared norms for one fixed target: every kind and loss against 80-digit arithmetic."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from bench.gpu.compile_cases import configured  # noqa: E402
from bench.gpu.sanitize.cases import PATHS  # noqa: E402
from fastgrad.losses import TARGETS  # noqa: E402
from fastgrad.ops.triton.contrasts import contrast_sqnorm, target_sqnorm  # noqa: E402

LOSSES = ("cross_entropy", "bce", "mse", "brier")
pytestmark = pytest.mark.usefixtures("poison")


def targets(kind: str, logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the launcher takes, and the dense float64 target the oracle takes."""
    B, N = logits.shape
    top = logits.argmax(-1)
    if kind == "ones":
        return None, torch.ones(B, N, dtype=torch.float64)
    if kind == "uniform":
        return None, torch.full((B, N), 1 / N, dtype=torch.float64)
    if kind == "predicted":
        return None, F.one_hot(top, N).double()
    k = torch.randint(N, (B,), generator=generator)
    k[::2] = top[::2]
    return k, F.one_hot(k, N).double()


def run(
    features: torch.Tensor, logits: torch.Tensor, target: torch.Tensor | None, kind: str, loss: str,
    device: torch.device, *, bias: bool = True, log: bool = False, mean: bool = False,
) -> torch.Tensor:  # fmt: skip
    target = None if target is None else target.to(device)
    return target_sqnorm(features.to(device), logits.to(device), target, kind, loss, bias, log, mean)


KINDS = (*TARGETS, "indices")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_accuracy(loss: str, kind: str, log: bool, path: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    margins = (0.0, 1.0, 5.0, 10.0, 20.0, 40.0)
    logits = torch.cat([oracles.confident_logits(1, 37, margin, generator) for margin in margins])
    features = torch.randn(len(margins), 7, generator=generator)
    target, dense = targets(kind, logits, generator)
    with configured(last_layer=PATHS[path]):
        out = run(features, logits, target, kind, loss, device, log=log)
    assert out.dtype == torch.float32
    for b, got in enumerate(out.cpu().tolist()):
        exact = oracles.target_norms(logits[b].tolist(), dense[b].tolist(), loss)
        exact = exact * oracles.square_norm(features[b].tolist())
        oracles.check(got, exact, log, b)


@pytest.mark.parametrize("kind", ["ones", "uniform", "predicted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_class(loss: str, kind: str, device: torch.device) -> None:
    logits = torch.tensor([[0.5], [-40.0], [17.0], [80.0]])
    for log in (False, True):
        out = run(torch.zeros(4, 2), logits, None, kind, loss, device, log=log)
        for b, got in enumerate(out.cpu().tolist()):
            oracles.check(got, oracles.target_norms(logits[b].tolist(), [1.0], loss), log, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ones", "uniform"])
def test_nearly_equal_logits(kind: str, path: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 1e-3 * torch.randn(3, 21, generator=generator)
    _, dense = targets(kind, logits, generator)
    with configured(last_layer=PATHS[path]):
        out = run(torch.zeros(3, 2), logits, None, kind, "cross_entropy", device)
    for b, got in enumerate(out.cpu().tolist()):
        oracles.check(got, oracles.target_norms(logits[b].tolist(), dense[b].tolist(), "cross_entropy"), False, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_several_classes_of_a_row(loss: str, path: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    features, logits = torch.randn(3, 5, generator=generator), 4 * torch.randn(3, 37, generator=generator)
    classes = logits.topk(5).indices
    with configured(last_layer=PATHS[path]):
        out = run(features, logits, classes, "indices", loss, device)
        every = contrast_sqnorm(features.to(device), logits.to(device), loss, True, False, False)
    assert out.shape == (3, 5)
    # Two kernels, whose last operations may be contracted differently.
    torch.testing.assert_close(out, every.gather(1, classes.to(device)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_bias_mean_and_dtype(kind: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20, 3, generator=generator).bfloat16().T
    features = torch.randn(3, 16, generator=generator).bfloat16()[:, ::2]
    target, dense = targets(kind, logits, generator)
    if target is not None:
        target = target.repeat_interleave(2)[::2]
    out = run(features, logits, target, kind, "bce", device, bias=False, mean=True)
    for b, got in enumerate(out.cpu().tolist()):
        exact = oracles.target_norms(logits[b].double().tolist(), dense[b].tolist(), "bce")
        exact = exact * oracles.square_norm(features[b].double().tolist(), bias=False) / 400
        oracles.check(got, exact, False, b)


def test_bad_rows_stay_alone(device: torch.device) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    logits[1, 2] = math.nan
    index = torch.tensor([3, 3, 9, -1])
    for loss in LOSSES:
        out = run(torch.ones(4, 2), logits, index, "indices", loss, device)
        assert out.isnan().tolist() == [False, True, True, True]


def test_empty_batch(device: torch.device) -> None:
    assert run(torch.ones(0, 3), torch.ones(0, 7), None, "ones", "bce", device).shape == (0,)
