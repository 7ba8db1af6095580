"""GradientFeatures: exactness, the model left as it was, threads, reduced precision."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradient_oracle import relative_error, true_norms
from small_nets import Net, recorded
from torch import Tensor, nn

import fastgrad
from fastgrad import losses
from fastgrad.ops.dispatch import interpreting

EPS = torch.finfo(torch.float32).eps
LABELS = torch.tensor([0, 1, 2, 3, 0])


def residual(net: Any, x: Tensor) -> Tensor:
    """A block with in-place activation and an in-place sum, as torchvision's."""
    x = torch.relu_(net.stem(x))
    out = net.scale * net.relu(net.bn(net.conv(x)))
    out += x
    return net.head(net.drop(net.relu(out).mean((2, 3))))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    conv, relu = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(inplace=True)
    net = Net(residual, stem=nn.Conv2d(3, 6, 3, stride=2), conv=conv, bn=nn.BatchNorm2d(6), relu=relu,
              scale=nn.Parameter(torch.full((6, 1, 1), 0.7)), drop=nn.Dropout(0.5), head=nn.Linear(6, 4),
              unused=nn.Linear(2, 2))  # fmt: skip
    nn.init.uniform_(net.bn.running_mean, -0.5, 0.5)
    nn.init.uniform_(net.bn.running_var, 0.5, 1.5)
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 3, 9, 9)


def expected(model: nn.Module, x: Tensor, loss: str, target: Any, **kwargs: Any) -> Tensor:
    return true_norms(
        model,
        (x,),
        lambda i, z: losses.delta(z, target[i : i + 1] if isinstance(target, Tensor) else target, loss=loss),
        **kwargs,
    )


def assert_close(value: Tensor, truth: Tensor, tolerance: float = 1e-4) -> None:
    assert value.shape == truth.shape
    assert relative_error(value, truth, EPS).max() <= tolerance


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("target", losses.TARGETS)
def test_exact_for_every_loss_and_target(model: Net, x: Tensor, loss: str, target: str) -> None:
    logits, features = fastgrad.GradientFeatures(model, loss=loss, target=target)(x)
    assert torch.allclose(logits, model(x), rtol=1e-4, atol=1e-6)
    assert not logits.requires_grad
    assert_close(features, expected(model, x, loss, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contrast_and_signals(model: Net, x: Tensor, dtype: torch.dtype) -> None:
    model, x = model.to(dtype), x.to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    _, features = fastgrad.GradientFeatures(model, loss="cross_entropy", target="contrast")(x)
    assert features.shape == (5, 4, 10)
    assert features.dtype == dtype
    for k in range(4):
        assert_close(features[:, k], expected(model, x, "cross_entropy", torch.full((5,), k)), tolerance)
    signals = [("bce", "ones"), ("mse", 2), ("brier", torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype))]
    _, joint = fastgrad.GradientFeatures(model, signals=signals)(x)
    assert joint.shape == (5, 3, 10)
    for s, (loss, target) in enumerate(signals):
        _, single = fastgrad.GradientFeatures(model, loss=loss, target=target)(x)
        assert_close(joint[:, s], single.double(), tolerance)
    _, mean = fastgrad.GradientFeatures(model, loss="cross_entropy", target=lambda _: LABELS, reduction="mean")(x)
    assert_close(mean * 16, expected(model, x, "cross_entropy", LABELS), tolerance)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("target", [LABELS, 0.7 * nn.functional.one_hot(LABELS, 4).double()])
def test_targets_of_a_call(model: Net, x: Tensor, chunk_size: int | None, target: Tensor) -> None:
    model, x = model.double(), x.double()
    extractor = fastgrad.GradientFeatures(model, loss="cross_entropy", chunk_size=chunk_size)
    truth = expected(model, x, "cross_entropy", target)
    assert_close(extractor(x, target=target)[1], truth, 1e-10)
    one, *same = (fastgrad.GradientFeatures(model, target=t)(x)[1] for t in (1, lambda _: 1, lambda _: torch.tensor(1)))
    assert all(torch.equal(one, other) for other in same)


def test_names_layers_and_the_report(model: Net, x: Tensor) -> None:
    extractor = fastgrad.GradientFeatures(model)
    with pytest.raises(RuntimeError, match="one call first"):
        extractor.report()
    _, everything = extractor(x)
    names = extractor.names
    assert names == [name for name, _ in model.named_parameters()]
    report = {r.parameter: (r.route, r.reason) for r in extractor.report()}
    assert list(report) == names
    assert report["stem.weight"] == ("rule", "convolution")
    assert report["scale"] == ("copies", "no rule serves the function that uses it, so each sample has a copy")
    assert report["unused.weight"][0] == "unused"
    assert not everything[:, names.index("unused.weight")].any()
    some = fastgrad.GradientFeatures(model, layers=["head", "*n*.weight", "stem.bias"])
    assert some.names == ["stem.bias", "conv.weight", "bn.weight", "head.weight", "head.bias", "unused.weight"]
    assert torch.allclose(some(x)[1], everything[:, [names.index(n) for n in some.names]])
    with pytest.raises(ValueError, match=r"layers.*'tail'"):
        fastgrad.GradientFeatures(model, layers="tail")


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"memory_budget": 20_000}, {"chunk_size": 50}])
def test_chunks(model: Net, x: Tensor, options: dict[str, int]) -> None:
    logits, features = fastgrad.GradientFeatures(model)(x)
    some_logits, some = fastgrad.GradientFeatures(model, **options)(x)
    assert torch.allclose(logits, some_logits, rtol=1e-5, atol=1e-6)
    assert torch.allclose(features, some, rtol=1e-4)


def test_empty_and_single_batches(model: Net, x: Tensor) -> None:
    for options, middle in (({}, ()), ({"target": "contrast"}, (4,)), ({"signals": [("bce", "ones")] * 2}, (2,))):
        extractor = fastgrad.GradientFeatures(model, **options)
        logits, features = extractor(x[:0])
        assert logits.shape == (0, 4)
        assert features.shape == (0, *middle, 10)
        assert torch.allclose(extractor(x[:1])[1], extractor(x)[1][:1], rtol=1e-4)


@pytest.mark.parametrize("margin", [60, 100, 130, 300])
def test_logarithms_reach_below_the_smallest_float(model: Net, x: Tensor, margin: int) -> None:
    with torch.no_grad():
        model.head.bias[1] += margin  # delta near 1e-26 for 60; for 130 it is no float32 either
    kwargs: dict[str, Any] = {"loss": "cross_entropy", "target": "predicted"}
    _, logs = fastgrad.GradientFeatures(model, log=True, **kwargs)(x)
    truth = expected(model, x, "cross_entropy", "predicted")
    used = truth.sum(0) > 0
    assert torch.isfinite(logs).all()
    assert torch.allclose(logs[:, used].double(), truth[:, used].log(), rtol=1e-5)
    with torch.no_grad():
        model.head.bias[1] += 1e4
    assert (fastgrad.GradientFeatures(model, log=True, **kwargs)(x)[1][:, used] < logs[:, used]).all()


def state(model: nn.Module) -> list[Any]:
    """Attributes of all modules, their parameters and buffers by identity, and what a call may do to parameters."""
    held = [vars(module).items() for module in model.modules()]
    same = [{k: {n: id(t) for n, t in v.items()} if isinstance(v, dict) else v for k, v in items} for items in held]
    return [*same, *((p.requires_grad, p.grad, p._version) for p in model.parameters())]


def test_the_model_stays_as_it_was(model: Net, x: Tensor) -> None:
    """Also after an exception. Frozen parameters have features all the same, and dropout is off."""
    model.train()
    model.bn.eval()
    model.head.weight.requires_grad_(False)
    calls: list[str] = []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    before, rng, extractor = state(model), torch.get_rng_state(), fastgrad.GradientFeatures(model)
    assert_close(extractor(x)[1], expected(model, x, "bce", "ones"))
    assert {"forward", "backward"} == set(calls)
    handle = model.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("boom")))
    with pytest.raises(KeyError, match="boom"):
        extractor(x)
    handle.remove()
    with pytest.raises(RuntimeError):
        extractor(torch.randn(2, 7, 9, 9, generator=torch.Generator().manual_seed(0)))
    assert state(model) == before
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_threads_share_one_model(model: Net, x: Tensor) -> None:
    model.train()
    extractor = fastgrad.GradientFeatures(model)
    inputs = [x + i for i in range(4)]
    truth = [extractor(v)[1] for v in inputs]
    stop = threading.Event()

    def work(i: int) -> bool:
        found = [extractor(inputs[i])[1] for _ in range(10)]
        return all(torch.allclose(f, truth[i], rtol=1e-5) for f in found)

    def train() -> None:  # the user's own passes go on in another thread
        while not stop.is_set():
            model.head(torch.randn(2, 6)).sum().backward()

    def record() -> bool:
        frozen = copy.deepcopy(model).eval()
        loss = nn.BCEWithLogitsLoss(reduction="sum")
        found = [recorded(frozen, lambda: loss(frozen(inputs[0]), torch.ones(5, 4))) for _ in range(10)]
        return all(torch.allclose(f, truth[0], rtol=1e-4) for f in found)

    with futures.ThreadPoolExecutor(6) as pool:
        trained = pool.submit(train)
        others = [*(pool.submit(work, i) for i in range(4)), pool.submit(record)]
        futures.wait(others)
        stop.set()
    assert trained.exception() is None
    assert all(other.result() for other in others)
    assert model.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(model: Net, x: Tensor, context: Callable[[], Any]) -> None:
    _, truth = fastgrad.GradientFeatures(model)(x)
    with context():
        logits, features = fastgrad.GradientFeatures(model)(x.clone())
    assert torch.equal(features, truth)
    assert not logits.requires_grad
    with torch.inference_mode():
        made_inside = copy.deepcopy(model)
    assert torch.equal(fastgrad.GradientFeatures(made_inside)(x)[1], truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision(model: Net, x: Tensor, dtype: torch.dtype, *, autocast: bool) -> None:
    """Against float64 on the same rounded weights; the network itself rounds each tensor to ``dtype``."""
    low, given = (model, x) if autocast else (copy.deepcopy(model).to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype, enabled=autocast):
        logits, features = fastgrad.GradientFeatures(low)(given)
    assert (logits.dtype, features.dtype) == (dtype, torch.float32)
    truth = expected(low, given, "bce", "ones")
    assert ((features - truth).abs() <= 40 * torch.finfo(dtype).eps * truth).all()


@pytest.mark.parametrize("whole", [True, False])
def test_several_signals_where_parameters_have_another_dtype_than_activations(x: Tensor, *, whole: bool) -> None:
    """PyTorch's batched backward pass of batch norm on a CPU raises there: TwoStageModel called every input unusual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
    model(x)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=whole)
    if not whole:
        model.to(torch.bfloat16)[1].float()
        x = x.to(torch.bfloat16)
    signals = [("bce", "ones"), ("cross_entropy", "predicted")]
    with cast:
        _, joined = fastgrad.GradientFeatures(model, signals=signals)(x)
        alone = [fastgrad.GradientFeatures(model, loss=loss, target=target)(x)[1] for loss, target in signals]
    torch.testing.assert_close(joined, torch.stack(alone, 1), rtol=8 * torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize(
    "wrap", [lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, z.sum()), lambda z: z]
)
def test_kinds_of_outputs_and_keyword_inputs(model: Net, x: Tensor, wrap: Callable[[Tensor], Any]) -> None:
    wrapped = Net(lambda own, *, pixels: wrap(own.net(pixels)), net=model)
    _, features = fastgrad.GradientFeatures(wrapped)(pixels=x)
    assert torch.equal(features, fastgrad.GradientFeatures(model)(x)[1])


def test_the_kernels_on_request(model: Net, x: Tensor) -> None:
    _, truth = fastgrad.GradientFeatures(model, impl="eager")(x)
    with pytest.raises(ValueError, match="float64"):
        fastgrad.GradientFeatures(copy.deepcopy(model).double(), impl="triton")(x.double())
    pytest.importorskip("triton")
    if not (torch.cuda.is_available() or interpreting()):
        pytest.skip("needs a GPU or the interpreter")
    _, features = fastgrad.GradientFeatures(model, impl="triton")(x)
    assert_close(features, truth.double())


@pytest.mark.parametrize("way", ["model", "extractor", "in place", "part in place", "part"])
def test_compiled_models_and_extractors(model: Net, x: Tensor, way: str) -> None:
    _, truth = fastgrad.GradientFeatures(model)(x)
    compiled: Any = functools.partial(torch.compile, backend="eager")
    extractor = fastgrad.GradientFeatures(compiled(model) if way == "model" else model)
    if way == "part":
        model.conv = compiled(model.conv)
    elif "in place" in way:
        (model if way == "in place" else model.conv).compile(backend="eager")
    call = compiled(extractor) if way == "extractor" else extractor
    torch.testing.assert_close(call(x)[1], truth)
    torch.compiler.reset()
