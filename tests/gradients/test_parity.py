"""Clipped gradients and norms beside Opacus' hooks and ghost clipping, where training code leaves the plain path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import clipped_gradients
from small_nets import Net
from torch import Tensor, nn

import fastgrad

pytest.importorskip("opacus", minversion="1.6")

# Opacus' hooks fire where no input requires gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

LIMIT = 0.5


def language() -> Net:
    """Next tokens ``(B, T, 7)``; Opacus' ghost clipping knows all of these layers, and no weight is tied."""
    body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 7, bias=False))
    return Net(lambda net, x: net.body(net.tokens(x)), tokens=nn.Embedding(7, 6), body=body)


Part = tuple[Tensor, Tensor]
Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Batches of one step, their losses, the limit of a sample's norm, and the model."""

    batches: list[Part]
    losses: Losses
    limit: float = LIMIT
    model: Callable[[], nn.Module] = language


def tokens(samples: int, seed: int, masked: bool = False) -> Part:
    made = torch.Generator().manual_seed(seed)
    x, y = torch.randint(7, (samples, 5), generator=made), torch.randint(7, (samples, 5), generator=made)
    if masked:
        y[torch.rand(y.shape, generator=made) < 0.4] = -100
        y[:, 0] = 1
    return x, y


def images(samples: int, seed: int) -> Part:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 5, 5, generator=made), torch.randint(3, (samples,), generator=made)


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a sample is the sum of its tokens'."""
    return F.cross_entropy(model(x).mT, y, reduction="none").sum(1)


def averaged(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a sample is the mean of its tokens that count."""
    return summed(model, x, y) / (y != -100).sum(1)


SCALE = 2.0**12
CASES = {
    "a batch": Case([tokens(6, 0)], summed),
    "images": Case([images(6, 0)], plain, model=convolutional),
    "a batch of one": Case([tokens(1, 1)], summed),
    "loss scaling": Case(
        [tokens(6, 2)], lambda model, x, y: SCALE * summed(model, x, y), SCALE * LIMIT
    ),
    "masked tokens": Case([tokens(6, 3, masked=True)], averaged),
    "accumulated batches": Case([tokens(n, n, masked=True) for n in (2, 1, 3)], averaged),
}  # fmt: skip


def ours(model: nn.Module, case: Case) -> tuple[Tensor, list[Any]]:
    with fastgrad.clip_gradients(model, case.limit) as clipped:
        norms = [clipped.backward(case.losses(model, *batch)) for batch in case.batches]
    return torch.cat(norms), [p.grad for p in model.parameters()]


def sgd(kind: Callable[..., Any], wrapped: nn.Module, limit: float) -> Any:
    """One of Opacus' optimizers, which clips and adds no noise."""
    options: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": limit, "expected_batch_size": 1}
    return kind(torch.optim.SGD(wrapped.parameters()), **options, loss_reduction="sum")


def accumulate(optimizer: Any) -> None:
    """Take up one part of a batch, as Opacus' BatchMemoryManager does."""
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()


def hooks(model: nn.Module, case: Case) -> tuple[Tensor, list[Any]]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = sgd(DPOptimizer, wrapped, case.limit)
    norms = []
    for batch in case.batches:
        optimizer.zero_grad()
        case.losses(wrapped, *batch).sum().backward()
        squares = [p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()]
        norms.append(torch.stack(squares).sum(0).sqrt())
        accumulate(optimizer)
    return torch.cat(norms), [p.summed_grad for p in wrapped.parameters()]


def ghost(model: nn.Module, case: Case) -> tuple[Tensor, list[Any]]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    wrapped: Any = GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=case.limit, use_ghost_clipping=True
    )
    optimizer = sgd(DPOptimizerFastGradientClipping, wrapped, case.limit)
    norms = []
    for batch in case.batches:
        DPTensorFastGradientClipping(wrapped, optimizer, case.losses(wrapped, *batch), "sum").backward()
        norms.append(wrapped.per_sample_gradient_norms)
        accumulate(optimizer)
    return torch.cat(norms), [p.summed_grad for p in wrapped.parameters()]


@pytest.mark.parametrize("implementation", [ours, hooks, ghost], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_norms_and_clipped_gradients_are_those_of_the_loop(name: str, implementation: Any) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model()
    norms, grads = implementation(copy.deepcopy(model), case)
    wanted, total = clipped_gradients(model, case.batches, case.losses, case.limit)
    assert (wanted > case.limit).any()
    torch.testing.assert_close(norms.double(), wanted, rtol=1e-5, atol=0)
    # Opacus adds 1e-6 to every norm before it divides.
    for g, t in zip(grads, total, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-5 * case.limit)


def test_an_empty_batch_that_random_sampling_drew() -> None:
    torch.manual_seed(0)
    model, case = language(), Case([tokens(0, 0)], summed)
    norms, grads = ours(copy.deepcopy(model), case)
    assert norms.shape == (0,)
    assert all(g is None or not g.any() for g in grads)
    theirs, others = hooks(copy.deepcopy(model), case)
    assert theirs.shape == (0,)
    assert all(not g.any() for g in others)
