"""Graphs of a function for any batch size, with the numbers of the function, and functions that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import FORMS, X, shapes, two_stage_model
from torch import Tensor, nn

from fastgrad.deploy.file.export import compile_function, export
from fastgrad.deploy.file.graph import trace
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.detector.constants import WEIGHT


def gradient_norms(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and, by autograd, each sample's squared norm of the input's gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient.flatten(1).square().sum(1)


def network() -> nn.Module:
    """Batch norms with every statistic away from its initial value."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3),
    )  # fmt: skip
    for module in net:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.2, 2.0)
    return net.eval().double()


@pytest.mark.parametrize("most", [1, 2, 64])
def test_graph_equals_function(most: int) -> None:
    net = network()
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    program = trace(lambda x: gradient_norms(net, x), torch.zeros(2, 3, 8, 8, dtype=torch.float64), max_batch=most)
    for batch in {1, 2, 5, 64}.intersection(range(most + 1)):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        for ours, expected in zip(program.module()(x), gradient_norms(net, x), strict=True):
            # Sums of some hundred terms, in another order for another number of rows.
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    # The model keeps its parameters.
    for name, value in net.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])


def looped(x: Tensor) -> Tensor:
    return torch.stack([row.sum() * i for i, row in enumerate(x)])


def fixed(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1) + torch.zeros(int(x.shape[0]))


def turned(x: Tensor) -> Tensor:
    with torch.enable_grad():
        angles = x.detach().flatten(1)[:, :6].requires_grad_()
        grid = nn.functional.affine_grid(angles.view(-1, 2, 3), list(x.shape), align_corners=False)
        return torch.autograd.grad(grid.square().sum(), angles)[0]


def doubled(x: Tensor) -> Tensor:
    # As those of quantised networks are.
    library = torch.library.Library("fastgrad_tests", "FRAGMENT")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: 2 * x, "CPU")
    return torch.ops.fastgrad_tests.doubled(x)


def without_kernel(x: Tensor) -> Tensor:
    raise NotImplementedError("could not find kernel for quantized.conv2d")


def clipped(x: Tensor) -> Tensor:
    return torch.from_numpy(np.clip(x.detach().numpy(), 0, 1))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (looped, RuntimeError, r"depends on the batch size.* or a loop over x$"),
        (fixed, RuntimeError, "without int"),
        (turned, RuntimeError, "PyTorch has for fixed sizes alone"),
        (doubled, ValueError, r"for values alone.* PyTorch says: fastgrad_tests\.doubled\.default"),
        (without_kernel, ValueError, r"for values alone.* could not find kernel for quantized\.conv2d"),
        (clipped, ValueError, r"hand them to NumPy.* PyTorch says: \.numpy\(\) is not supported"),
    ],
)
def test_functions_without_a_graph(function: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(function, X)


def assert_equal(ours: tuple, theirs: tuple) -> None:
    """To 1e-5: logits relative to their size or 1, probabilities and risk absolutely, and each score's p relatively.

    In the uncertainty the challenge classifier's -log p counts `WEIGHT` times, and so does its rounding. For a network
    that was trained: what 1e-7 of rounding becomes depends on how much images differ to the network.
    """
    allowed = ((1e-5, 1e-5), (0.0, 1e-5), (0.0, WEIGHT * 1e-5), (0.0, 1e-5))
    # Without labels there is no risk.
    for got, expected, (relative, absolute) in zip(ours, theirs, allowed[: len(theirs)], strict=True):
        torch.testing.assert_close(got, expected, rtol=relative, atol=absolute)


def outputs(prediction: tuple) -> tuple:
    return tuple(value for value in prediction[:4] if value is not None)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "forward" else pytest.mark.slow) for form in FORMS]
)
def test_two_stage_model_is_one_graph(form: str) -> None:
    live = two_stage_model(form)
    program = trace(lambda x: outputs(live(x)), X)
    assert not [node for node in program.graph.nodes if "fastgrad" in str(node.target)]
    for batch in (1, 2, 7, 64):
        x, _ = shapes(batch, 2000 + batch)
        assert_equal(program.module()(x), outputs(live(x)))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_stage_model_in_one_file(form: str, tmp_path: Path) -> None:
    live = two_stage_model(form)
    package = ModelPackage(export(live, X, tmp_path / "m.pt2"))
    assert package.description.threshold == pytest.approx(live.threshold(0.05))
    assert package.description.histogram is not None
    for batch in (1, 3, 64):
        x, _ = shapes(batch, 2000 + batch)
        assert_equal(outputs(package(x)), outputs(live(x)))


@pytest.mark.slow
def test_rounding_of_norms_and_gelu(tmp_path: Path) -> None:
    from torch._inductor import decomposition

    known = set(decomposition.decompositions)
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(256)).eval()
    compile_function(lambda x: net(x).detach(), torch.zeros(2, 4, 8, 8), tmp_path / "n.pt2")
    assert set(decomposition.decompositions) == known
    run = torch._inductor.aoti_load_package(str(tmp_path / "n.pt2"))
    for batch in (1, 2, 9):
        x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(run(x), net(x))
