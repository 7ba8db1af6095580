"""Functions that use parameters in other ways than layers do: by which route, and that each is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from small_nets import Net, alone, assert_exact, check, check_several, inputs, parts, recorded, routes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastgrad

X = inputs(5, 3)


class Squared(torch.autograd.Function):
    """A function whose arguments Python's protocol for subclasses does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g * weight * weight, (2 * g * x * weight).sum(0)


class Again(torch.autograd.Function):
    """A module that its backward runs again, as reversible networks and solvers do, and asks for all gradients."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.module(x), (x, *parameters), gradient)


class Sine(torch.autograd.Function):
    """Looks at the gradients that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos() if g.abs().max().item() > 0 else g


def forces(net: Any, x: Tensor) -> Tensor:
    """The gradient of an energy, which the model itself takes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = (net.layer(x).tanh() @ net.matrix).sum(1)
        return net.head(torch.autograd.grad(energy.sum(), x, create_graph=True)[0]) + energy[:, None]


def caught(net: Any, x: Tensor) -> Tensor:
    """What a part computes leaves it by an exception."""

    def leave() -> None:
        raise LookupError(net.layer(x))

    try:
        leave()
    except LookupError as error:
        return net.head(error.args[0].tanh() @ net.matrix)
    return x


def hooked(register: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def function(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.layer(x))
        if h.requires_grad:
            register(h)
        return net.head(h)

    return function


def filled(net: Any, x: Tensor) -> Tensor:
    """Rows of parameters and samples in one tensor that was made for them."""
    rows = torch.empty(len(x), 2, 3, dtype=x.dtype)
    rows[:, 0], rows[:, 1] = net.scale, x
    return net.head(rows.prod(1))


def experts(net: Any, x: Tensor) -> Tensor:
    """Samples go to one of two layers each, by a mask."""
    out, mask = torch.zeros_like(x), x[:, 0] > 0
    out[mask], out[~mask] = net.layer(x[mask]), net.other(x[~mask])
    return net.head(out.tanh())


CLOSED = nn.Linear(3, 3).double()
#: Functions, the parameter that is looked at, and its route.
USED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "linear": (lambda net, x: net.head(F.linear(x, net.matrix)), "matrix", "rule"),
    "matmul": (lambda net, x: net.head(x @ net.matrix), "matrix", "rule"),
    "addmm": (lambda net, x: net.head(torch.addmm(net.scale, x, net.matrix)), "matrix", "rule"),
    "addmm with a factor": (lambda net, x: net.head(torch.addmm(net.scale, x, net.matrix, beta=2)), "matrix", "copies"),
    "addmm of parameters": (
        lambda net, x: net.head(x @ torch.addmm(net.scale, net.matrix, net.layer.weight)), "matrix", "copies"),
    "recurrent with a computed weight": (
        lambda net, x: net.head(torch.rnn_tanh(x[None], x.new_zeros(1, len(x), 3), [net.matrix.cos(), net.layer.weight],
                                               False, 1, 0.0, False, False, False)[0][0]), "matrix", "alone"),
    "bias computed": (lambda net, x: net.head(F.linear(x, net.matrix, net.scale.exp())), "matrix", "copies"),
    "of a parameter": (lambda net, x: net.head(x * F.linear(net.scale, net.matrix)), "matrix", "copies"),
    "product of two": (lambda net, x: net.head(x @ (net.matrix @ net.layer.weight)), "matrix", "copies"),
    "vector": (lambda net, x: net.head(x * F.linear(x, net.scale).unsqueeze(-1)), "scale", "copies"),
    "norm of a parameter": (lambda net, x: net.head(x @ F.layer_norm(net.matrix, (3,))), "matrix", "copies"),
    "group norm of a parameter": (lambda net, x: net.head(x @ F.group_norm(net.matrix, 1)), "matrix", "copies"),
    "convolution": (lambda net, x: net.head(F.conv1d(x.unsqueeze(2), net.kernel)[..., 0]), "kernel", "rule"),
    "convolution without a batch": (lambda net, x: net.head(F.conv1d(x.mT, net.kernel).mT), "kernel", "copies"),
    "convolution with a computed bias": (
        lambda net, x: net.head(F.conv1d(x.unsqueeze(2), net.kernel, net.scale.exp())[..., 0]), "kernel", "copies"),
    "convolution of a parameter": (lambda net, x: net.head(x @ F.conv1d(net.start, net.kernel)[0]), "kernel", "copies"),
    "transposed": (lambda net, x: net.head(x @ net.matrix.T), "matrix", "copies"),
    "on the left": (lambda net, x: net.head((net.matrix @ x.mT).mT), "matrix", "copies"),
    "einsum": (lambda net, x: net.head(torch.einsum("bi,ij->bj", x, net.matrix)), "matrix", "copies"),
    "layer norm": (lambda net, x: net.head(F.layer_norm(x, (3,), net.scale, eps=0.1)), "scale", "rule"),
    "scaled": (lambda net, x: net.head(x * net.scale), "scale", "copies"),
    "in place": (lambda net, x: net.head(x.clone().mul_(net.scale).add_(net.scale)), "scale", "copies"),
    "out of a list": (lambda net, x: net.head(torch.stack([net.scale.expand_as(x), x]).prod(0)), "scale", "copies"),
    "weight computed": (lambda net, x: net.head(F.linear(x, net.matrix - net.matrix.mean())), "matrix", "copies"),
    "filled": (filled, "scale", "copies"),
    "twice": (lambda net, x: net.head(net.layer(net.layer(x).tanh())), "layer.weight", "sum"),
    "two ways": (lambda net, x: net.head(net.layer(x) * (x @ net.layer.weight)), "layer.weight", "sum"),
    "spectral": (
        lambda net, x: net.head(
            (torch.view_as_complex(torch.stack([x, x.cos()], -1)) * torch.fft.fft(net.scale)).abs()),
        "scale", "copies"),
    "looked at": (lambda net, x: net.head(x @ net.matrix if net.matrix.requires_grad else x), "matrix", "rule"),
    "sparse": (
        lambda net, x: net.head(torch.sparse.mm(torch.eye(3).double().to_sparse() * 2, (x @ net.matrix).mT).mT),
        "matrix", "rule"),
    "by exception": (caught, "matrix", "rule"),
    "detached": (lambda net, x: net.head(x * net.scale.detach()), "scale", "unused"),
    "its shape": (lambda net, x: net.head(x.view(-1, net.scale.shape[0])), "scale", "unused"),
    "a closure": (lambda net, x: net.head(F.linear(x, CLOSED.weight)), "closed.weight", "rule"),
    "functional call": (lambda net, x: net.head(torch.func.functional_call(net.layer,
        dict(net.layer.named_parameters()), (x,))), "layer.weight", "rule"),
    "function of autograd": (lambda net, x: net.head(Squared.apply(x, net.scale)), "scale", "alone"),
    "run again": (lambda net, x: net.head(Again.apply(net.layer, x * net.scale, *net.layer.parameters())), "scale",
        "alone"),
    "gradients looked at": (lambda net, x: net.head(Sine.apply(net.layer(x))), "layer.weight", "alone"),
    "checkpoint": (lambda net, x: net.head(checkpoint(net.layer, x, use_reentrant=False)), "layer.weight",
        "rule or alone"),
    "checkpoint of a scale": (lambda net, x: net.head(checkpoint(lambda x: torch.tanh(net.scale * x), x,
        use_reentrant=False)), "scale", "copies or alone"),
    "gradients taken": (forces, "matrix", "alone"),
    "vmap inside": (lambda net, x: net.head(torch.func.vmap(F.linear, (None, 0))(x, net.matrix.expand(2, 3,
        3)).sum(0)), "matrix", "copies"),
    "mask": (experts, "layer.weight", "alone"),
    "cdist": (lambda net, x: net.head(torch.cdist(x[:, None], net.matrix.expand(len(x), 3, 3))[:, 0]), "matrix",
        "copies"),
    "tensor hook": (
        hooked(lambda h: h.register_hook(lambda g: g.clamp(-1e-2, 1e-2))), "layer.weight", "alone"),
    "node hook": (
        hooked(lambda h: h.grad_fn.register_prehook(lambda gradients: tuple(3 * g for g in gradients))),
        "layer.weight", "alone"),
    "dividing hook": (
        hooked(lambda h: h.register_hook(lambda g: g / g.abs().max())), "layer.weight", "alone"),
    "cond": (lambda net, x: net.head(torch.cond(x.sum() > -99, torch.sin, torch.cos, (x,))), "head.weight",
        "rule or alone"),
    "steps": (lambda net, x: net.head(torch.cumprod(x[:, None] * net.matrix, 1)[:, -1]), "matrix", "copies"),
}  # fmt: skip


@pytest.mark.parametrize("way", USED)
def test_a_parameter_is_used(way: str) -> None:
    function, name, route = USED[way]
    kernel, start = nn.Parameter(torch.randn(3, 3, 1)), nn.Parameter(torch.randn(1, 3, 3))
    model = parts(function, closed=CLOSED, kernel=kernel, start=start)
    check(model, (X,), (X[:1],), (10 * X[:2],))
    assert routes(model, X)[name] in route.split(" or ")


@pytest.mark.parametrize("way", ["function of autograd", "gradients looked at", "cdist", "checkpoint", "run again"])
def test_several_gradients_one_at_a_time(way: str) -> None:
    """``torch.vmap`` is silently wrong for the gradients of ``cdist``, and refuses what looks at values."""
    model = parts(USED[way][0], closed=CLOSED)
    check_several(model, model, X, torch.rand(2, 5, 2, dtype=torch.float64))


def test_call_without_a_rule_adds_to_one_with() -> None:
    model = parts(experts)

    def losses(x: Tensor) -> Tensor:
        return (model(x) + model.head(model.layer(x).tanh())).square().sum(1)

    truth = loss_norms((losses(row).sum() for row in X.split(1)), model)
    assert_exact(recorded(model, lambda: losses(X).sum()), truth)


#: Models of tokens, one of whose tables has padding.
TABLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tied": lambda net, t: F.linear(net.layer(net.table(t).mean(1)).tanh(), net.table.weight),
    "twice": lambda net, t: net.layer(net.table(t).mean(1) * net.table(t[:, :2]).sum(1)),
    "encoder": lambda net, t: net.head(
        net.encoder(net.table(t), src_key_padding_mask=t == 0)[:, -1] + net.table(t[:, -1])),
    "bag": lambda net, t: net.head(net.bag(t).tanh()),
    "bag by position": lambda net, t: net.head(
        F.embedding_bag(t, net.bag.weight, None, None, 2.0, False, "sum", net.bag.sparse).tanh()),
    "bag with offsets": lambda net, t: net.head(
        net.bag(t.flatten(), torch.arange(len(t)) * t.shape[1]).tanh()),
    "bag and table": lambda net, t: net.head(net.bag(t) * net.table(t).sum(1)),
    "by index": lambda net, t: net.head(net.table.weight[t].prod(1)),
    "by function": lambda net, t: net.head(F.embedding(t, net.table.weight, padding_idx=-5).exp().prod(1)),
}  # fmt: skip


@pytest.mark.parametrize("way", TABLES)
@pytest.mark.parametrize("sparse", [False, True])
def test_tables(way: str, sparse: bool) -> None:
    layer = nn.TransformerEncoderLayer(3, 1, 6, dropout=0.0, batch_first=True)
    table, bags = nn.Embedding(5, 3, padding_idx=-5), nn.EmbeddingBag(5, 3, mode="sum", sparse=sparse)
    model = parts(
        TABLES[way], table=table, bag=bags, encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )
    for rows in ([[1, 2, 3]] * 3 + [[0, 0, 4]], [[0, 1, 2], [3, 0, 4]], [[0, 0, 1]]):
        tokens = torch.tensor(rows)
        found = recorded(model, lambda tokens=tokens: model(tokens).square().sum())
        model.bag.sparse = False
        assert_exact(found, alone(model, (tokens,)))
        model.bag.sparse = sparse


def test_functions_that_vmap_does_not_know_give_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """Such as those that it would call sample by sample, with a warning that is PyTorch's own for others."""
    cell, bags = nn.GRUCell(3, 3), nn.EmbeddingBag(5, 3)
    model = Net(lambda net, t: net.cell(net.bag(t), net.cell(net.bag(t[:, :2]))), cell=cell, bag=bags)
    tokens = torch.randint(5, (6, 3))
    fastgrad.GradientFeatures(model, signals=[("bce", "ones"), ("cross_entropy", "ones")])(tokens)
    assert not recwarn
    torch.func.vmap(lambda one: model.bag(one[None]))(tokens)
    assert "performance drop" in str(recwarn.pop().message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["twice", "weight computed", "vmap inside", "einsum"])
def test_functions_in_any_precision(way: str, dtype: torch.dtype) -> None:
    model, x = parts(USED[way][0], closed=CLOSED).to(dtype), X.to(dtype)
    found = recorded(model, lambda: model(x).square().sum())
    truth = loss_norms((model(row).square().sum() for row in x.split(1)), model)
    eps = torch.finfo(dtype).eps
    assert ((found - truth).abs() <= 100 * eps * truth.amax(0)).all()
    assert found.dtype == torch.float32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recurrent", [False, True])
def test_gradients_that_autocast_rounds_are_no_samples_that_interact(seed: int, recurrent: bool) -> None:
    """Gates sum over all features, and so cancel much of what was rounded."""

    def gated(net: Any, x: Tensor) -> Tensor:
        for gate, layer in zip(net.gates, net.layers, strict=True):
            x = x + gate * layer(x).relu()
        return net.head(net.cell(x.unsqueeze(1))[0].squeeze(1) if recurrent else x)

    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    model = Net(gated, layers=layers, head=nn.Linear(8, 5), gates=nn.Parameter(torch.zeros(4)),
                cell=nn.LSTM(8, 8, batch_first=True))  # fmt: skip
    features, x = fastgrad.GradientFeatures(model), torch.randn(6, 8)
    _, truth = features(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, norms = features(x)
        plain = model.cell(x.unsqueeze(1))[0]
        with fastgrad.record(model):
            assert model.cell(x.unsqueeze(1))[0].dtype == plain.dtype
    assert ((norms - truth).abs().amax(0) <= 0.1 * truth.amax(0)).all()


class Image(Tensor):
    """Leaves its class when it is indexed, as images of torchvision do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        kept = func is Tensor.detach or not isinstance(result, Image)
        return result if kept else result.as_subclass(Tensor)


def test_inputs_of_a_class_of_their_own() -> None:
    model = parts(lambda net, x: net.head(net.layer(x).tanh() if isinstance(x, Image) else x))
    for x in (X, X.as_subclass(Image), X):
        truth = loss_norms((row.square().sum() for row in model(x)), model)
        assert_exact(recorded(model, lambda x=x: model(x).square().sum()), truth)


def test_mode_of_the_user_sees_functions() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double().eval()
    expected = recorded(model, lambda: model(X).sum())
    with Watch():
        found = recorded(model, lambda: model(X).sum())
    assert {F.linear, F.relu} <= set(seen)
    assert torch.equal(found, expected)
