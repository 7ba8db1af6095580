"""Schemas, shape contracts, autograd registration and both implementations of every operator of the last layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastgrad
from fastgrad._torch import require_cpp_compiler
from fastgrad.losses import LOSSES
from fastgrad.ops import dispatch, last_layer
from fastgrad.ops.conv.geometry import Kernel
from fastgrad.ops.conv.sqnorm import conv_sqnorm, linear_sqnorm
from fastgrad.ops.dispatch import choose

OPS = torch.ops.fastgrad


def arguments(name: str, device: torch.device, requires_grad: bool, loss: str) -> tuple[Any, ...]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=requires_grad)

    h, z, weight, b = leaf(3, 5), leaf(3, 6), leaf(6, 5), leaf(6)
    return {
        "contrast_sqnorm": (h, z, loss, True, False, False),
        "target_sqnorm": (h, z, torch.tensor([0, 5, 2], device=device), "indices", loss, True, False, True),
        "linear_contrast_sqnorm": (h, weight, b, loss, True, False),
        "contrast_stats": (h, z, loss, True, False),
        "linear_contrast_stats": (h, weight, b, loss, False),
    }[name]


NAMES = ("contrast_sqnorm", "target_sqnorm", "contrast_stats")


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator on the CPU runs its eager implementation."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def check(name: str, device: torch.device) -> None:
    operator = getattr(OPS, name).default
    opcheck(operator, arguments(name, device, True, "cross_entropy"))
    plain = arguments(name, device, False, "brier")
    opcheck(operator, plain, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_triton(name: str, device: torch.device) -> None:
    check(name, device)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_eager(name: str) -> None:
    check(name, torch.device("cpu"))


def test_arguments_without_a_kernel(device: torch.device) -> None:
    h, z = torch.randn(3, 5, device=device), torch.randn(3, 6, device=device)
    soft = (h, z, z.softmax(-1), "soft", "bce", True, False, False)
    with pytest.raises(ValueError, match=r"impl.*soft targets"):
        last_layer.target_sqnorm(*soft, "triton")
    torch.testing.assert_close(OPS.target_sqnorm(*soft), last_layer.target_sqnorm(*soft, "eager"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [*NAMES, "linear_contrast_sqnorm", "linear_contrast_stats"])
def test_triton_equals_eager(name: str, loss: str, device: torch.device) -> None:
    inputs = arguments(name, device, True, loss)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for impl in ("eager", "triton"):
        out = getattr(last_layer, name)(*inputs, impl)
        outs = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(o.shape, generator=generator).to(device) for o in outs]
        grads = torch.autograd.grad(outs, leaves, weights, create_graph=True)
        # As a penalty on gradients has them.
        second = torch.autograd.grad([grad.tanh().sum() for grad in grads], leaves)
        results.append([*outs, *grads, *second])
    for eager, triton in zip(*results, strict=True):
        # Two orders of summation of a dozen float32 terms.
        torch.testing.assert_close(triton, eager, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("same", [True, False])
def test_derivatives_of_dependent_arguments(same: bool, device: torch.device) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    results = []
    for impl in ("eager", "triton"):
        out = last_layer.contrast_sqnorm(x, x if same else x.sin(), "cross_entropy", True, True, False, impl)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.tanh().sum(), x)])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


def test_backward_under_autocast(device: torch.device) -> None:
    inputs = arguments("contrast_stats", device, True, "cross_entropy")
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(last_layer.contrast_stats(*inputs, "triton").sum(), inputs[:2]))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("hip", "capability", "name", "served"),
    [
        (None, (7, 0), "sm_70", False),
        (None, (7, 5), "sm_75", True),
        (None, (8, 7), "sm_87", True),
        (None, (12, 1), "sm_121", True),
        (None, (13, 0), "sm_130", False),
        ("7", (9, 4), "gfx942", True),
        ("7", (11, 0), "gfx1100", True),
        ("7", (11, 5), "gfx1151", False),
    ],
)
def test_gpus_without_compiled_kernels(
    hip: str | None, capability: tuple[int, int], name: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named, and run the eager form."""
    pytest.importorskip("triton")
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, gcnArchName=f"{name}:sramecc+")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "_gpus", {})
    tensor: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    for _ in range(2):  # the second answer is remembered
        assert choose("auto", tensor) == ("triton" if served else "eager")
    if not served:
        with pytest.raises(ValueError, match=f"'triton', but the device was {name}, and kernels are"):
            choose("triton", tensor)
    refused = name in ("sm_70", "sm_75", "gfx1100", "gfx1151")
    assert bool(dispatch.product_refusal(tensor.device)) is refused
    if served and refused:
        with pytest.raises(ValueError, match=f"the device was {name}, and this kernel multiplies on the matrix units"):
            choose("triton", tensor, dispatch.product_refusal(tensor.device))


def test_first_call_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(first: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: SimpleNamespace(contrast_sqnorm=launch))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launched = dispatch.launcher("contrasts", "contrast_sqnorm")
    for capturing, message in (
        (True, "contrast_sqnorm must be called once .* before a CUDA graph"),
        (False, "^operation"),
    ):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda found=capturing: found)
        with pytest.raises(RuntimeError, match=message):
            launched(SimpleNamespace(device=torch.device("cuda", 0)))


def test_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot differentiate the operators; ``vmap`` alone has a rule for them."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tensor: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    found: list[str] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        found.extend(choose("auto", tensor, mapped=mapped) for mapped in (False, True))
        return x

    torch.func.grad(noted)(torch.ones(()))
    torch.func.vmap(noted)(torch.ones(2))
    torch.func.vmap(torch.func.grad(noted))(torch.ones(2))
    assert found == ["eager", "eager", "eager", "triton", "eager", "eager"]
    assert choose("auto", tensor) == "triton"


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name: str, device: torch.device) -> None:
    h, z = torch.randn(3, 4, 5, device=device), torch.randn(4, 2, 3, device=device)
    rest = {
        "contrast_sqnorm": ("bce", True, False, False),
        "target_sqnorm": (None, "ones", "bce", True, False, False),
        "contrast_stats": ("bce", True, False),
    }[name]
    function = getattr(last_layer, name)
    found = [
        torch.vmap(lambda a, b, impl=impl: function(a, b, *rest, impl), in_dims=dims)(a, b)  # type: ignore[misc]
        for impl in ("eager", "triton")
        for a, b, dims in ((h, z, (1, 0)), (h[:2, 0], z, (None, 0)))
        for a, b in ((a, b.mT if dims == (1, 0) else b),)
    ]
    torch.testing.assert_close(found[2:], found[:2])
    with pytest.raises(ValueError, match=r"it was 'triton', but torch\.func cannot differentiate the kernel"):
        torch.func.grad(lambda a: function(a, z[0], *rest, "triton").sum())(h[:2, 0])


def test_recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    class Norms(torch.nn.Module):
        def forward(self, h: torch.Tensor, z: torch.Tensor, a: torch.Tensor) -> Any:
            layers = conv_sqnorm(a, a, Kernel((3,), (1,), (1,), (1,))), linear_sqnorm(a, a)
            given = fastgrad.contrast_sqnorm(h, z), fastgrad.target_sqnorm(h, z, "ones")
            return layers, given, fastgrad.linear_contrast_sqnorm(h, z), fastgrad.linear_contrast_stats(h, z)

    with FakeTensorMode():
        inputs = [torch.empty(shape, device="cuda") for shape in ((4, 4), (4, 4), (2, 3, 5))]
        recorded = make_fx(Norms())(*inputs)
        exported = torch.export.export(Norms(), tuple(inputs)).graph_module
    found = [{str(node.target) for node in graph.graph.nodes} for graph in (recorded, exported)]
    assert not any(target.startswith("fastgrad") for targets in found for target in targets)


def test_large_meta_tensors() -> None:
    z = torch.empty(40_000, 60_000, device="meta", dtype=torch.bfloat16)
    out = OPS.contrast_sqnorm(z[:, :8], z, "bce", True, False, False)
    assert out.shape == z.shape
    assert out.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_impl_and_device(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrad.ops.triton import devices

    launched, empty = [], devices.empty
    monkeypatch.setattr(devices, "empty", lambda *options: launched.append(options) or empty(*options))
    function, operator = getattr(last_layer, name), getattr(OPS, name)
    inputs = arguments(name, device, False, "cross_entropy")
    for call, expected in (
        (lambda: function(*inputs, "triton"), True),
        (lambda: function(*inputs, "eager"), False),
        (lambda: operator(*inputs), True),
    ):
        launched.clear()
        call()
        assert bool(launched) is expected
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = arguments(name, torch.device("cpu"), False, "cross_entropy")
    launched.clear()
    function(*inputs, "auto")
    operator(*inputs)
    assert launched == []
    with pytest.raises(ValueError, match="it was 'triton', but the device was cpu"):
        function(*inputs, "triton")


@pytest.mark.usefixtures("no_interpreter")
def test_compiler_makes_one_kernel_of_rows() -> None:
    """The operator is traced as its formula and fuses; the product of the layer is the other call."""
    from torch._inductor.utils import run_and_get_code

    try:
        require_cpp_compiler("the test's kernel")
    except RuntimeError as error:
        pytest.skip(str(error))

    def layer(h: torch.Tensor, weight: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return fastgrad.contrast_sqnorm(h, torch.nn.functional.linear(h, weight, b))

    h, weight, b = torch.randn(5, 8), 9 * torch.randn(20, 8), torch.randn(20)
    weight[3], b[3], h[1] = weight[9], b[9], 0  # a tie, and an unsure row
    torch._dynamo.reset()
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), h, weight, b)
        z = torch.nn.functional.linear(h, weight, b)
        exact = fastgrad.contrast_sqnorm(h.double(), z.double())
    calls = code.split("def call(")[1]
    assert calls.count("cpp_fused") == 1
    assert "fastgrad" not in calls
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    assert not torch._dynamo.explain(layer)(h, weight, b).graph_break_count
