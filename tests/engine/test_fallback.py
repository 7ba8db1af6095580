"""Parameters that several calls use, in layers that compute otherwise under ``vmap`` or without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import Misjudged, Net, assert_exact, check_losses, recorded
from torch import Tensor, nn
from torch.nn.functional import linear

import fastgrad


def tied(net: Any, tokens: Tensor) -> Tensor:
    """A table with padding whose rows are also the classes."""
    return linear(net.inner(net.table(tokens).mean(1)).tanh(), net.table.weight)


def twice(net: Any, tokens: Tensor) -> Tensor:
    """A table with padding that is asked twice."""
    return net.inner(net.table(tokens).mean(1) * net.table(tokens[:, :2]).sum(1))


def padded(function: Callable[..., Tensor]) -> Net:
    return Net(function, table=nn.Embedding(5, 4, padding_idx=-5), inner=nn.Linear(4, 4))


def encoder() -> Net:
    """PyTorch's encoder with a mask, one table for two sequences."""

    def function(net: Any, tokens: Tensor) -> Tensor:
        h = net.encoder(net.table(tokens), src_key_padding_mask=tokens == 0)
        return net.head(h[:, -1] + net.table(tokens[:, -1]))

    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return Net(function, table=nn.Embedding(5, 4), encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(4, 3))


def square(model: nn.Module, tokens: Tensor) -> Tensor:
    return (model(tokens) + 1).square().sum(1)


@pytest.mark.parametrize("make", [lambda: padded(tied), lambda: padded(twice), encoder])
def test_tables_that_are_used_twice(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    # Padding is not among the samples that a plan is tried on, but in those of other calls.
    for rows in ([[1, 2, 3]] * 5 + [[0, 0, 4]], [[0, 1, 2], [3, 0, 4]], [[0, 0, 1]]):
        check_losses(model, lambda tokens: square(model, tokens), torch.tensor(rows))


def gathered(net: Any, x: Tensor) -> Tensor:
    """Rows in the order of their sums, through a layer without a rule."""
    order = x.sum(1).argsort()
    return (x[order] * net.scale).tanh()[order.argsort()]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_gradients_whose_squares_leave_the_range_of_float32(factor: float) -> None:
    torch.manual_seed(0)
    model = Net(gathered, scale=nn.Parameter(torch.rand(4) + 0.5)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    found = recorded(model, lambda: factor * model(x).square().sum())
    truth = loss_norms((factor * model(one[None]).square().sum() for one in x), model)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=0)


def test_a_part_in_float32_rounds_otherwise_for_a_sample_alone() -> None:
    def partly(net: Any, x: Tensor) -> Tensor:
        order = x.sum(1).argsort()
        h = (x[order].float() @ net.weight.float()).tanh() @ net.weight.float()
        return h.double()[order.argsort()]

    torch.manual_seed(0)
    model, x = Net(partly, weight=nn.Parameter(torch.randn(16, 16))).double().eval(), torch.randn(40, 16).double()
    truth = loss_norms((model(one[None]).square().sum() for one in x), model)
    torch.testing.assert_close(recorded(model, lambda: model(x).square().sum()), truth, rtol=1e-4, atol=0)


def test_a_part_in_bfloat16_hides_no_mixing_in_another() -> None:
    def mixed(net: Any, x: Tensor) -> Tensor:
        h = (x @ net.weight).tanh() @ net.weight
        return h + (len(x) > 8) * h.mean(0)

    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.mixed(net.first(x.bfloat16()).float()),
        first=nn.Linear(4, 4).bfloat16(),
        mixed=Net(mixed, weight=nn.Parameter(torch.randn(4, 4))),
    ).eval()
    x, features = torch.randn(40, 4), fastgrad.GradientFeatures(model, chunk_size=40)
    features(x[:4])
    with pytest.raises(ValueError, match="'mixed' gives other gradients for a sample alone than for the batch"):
        features(x)


def states(net: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Classes, and in evaluation mode the states of all steps, steps first; one scale for both halves of the steps."""
    steps = x.transpose(0, 1)
    states = torch.cat([(half @ net.scale.diag()).tanh() for half in steps.chunk(2)])
    return (net.head(states.sum(0)),) if net.training else (net.head(states.sum(0)), states)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_with_the_batch_elsewhere(training: bool) -> None:
    torch.manual_seed(0)
    model = Net(states, scale=nn.Parameter(torch.rand(4) + 0.5), head=nn.Linear(4, 3)).double().train(training)
    x = torch.randn(3, 6, 4, dtype=torch.float64)

    def losses(x: Tensor) -> Tensor:
        out = model(x)
        return out[0].square().sum(1) + sum(states.pow(3).sum((0, 2)) for states in out[1:])

    check_losses(model, losses, x)
    truth = loss_norms((losses(one[None]).sum() for one in x), model)
    with fastgrad.clip_gradients(model, 1e3) as clipped:
        norms = clipped.backward(losses(x))
    torch.testing.assert_close(norms.square(), truth.sum(1), rtol=1e-10, atol=0)


def forces(net: Any, x: Tensor) -> Tensor:
    """The gradient of an energy, which the model itself takes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = net.second(torch.tanh(net.first(x)))
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0] + energy


def test_a_model_that_takes_gradients() -> None:
    torch.manual_seed(0)
    bent = Net(lambda net, x: torch.tanh(x @ net.weight), weight=nn.Parameter(torch.randn(5, 5)))
    first = nn.Sequential(nn.Linear(4, 5), bent)
    model, x = Net(forces, first=first, second=nn.Linear(5, 1)).double().eval(), torch.randn(5, 4).double()
    check_losses(model, lambda x: model(x).square().sum(1), x)


def plain_forces(net: Any, x: Tensor, weights: Tensor) -> Tensor:
    """The same where gradients are on, as they are for the callers of such a model."""
    if net.samples not in (None, len(x)):
        raise RuntimeError("another number of samples")
    x = x.detach().requires_grad_()
    return torch.autograd.grad(net.second(torch.tanh(net.first(x))).sum(), x, create_graph=True)[0] @ weights


def test_a_model_that_takes_gradients_has_them_in_every_look_at_it() -> None:
    """Also where inputs with as many rows as samples are in doubt, for no samples, and for the words of a refusal."""
    torch.manual_seed(0)
    model = Net(plain_forces, first=nn.Linear(4, 5), second=nn.Linear(5, 1), samples=None).double().eval()
    x, weights = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    check_losses(model, lambda x: model(x, weights).square().sum(1), x)
    assert fastgrad.GradientFeatures(model)(x[:0], weights)[1].shape == (0, 4)
    model.samples = 4
    with pytest.raises(ValueError, match="given 3 of 4 samples in a trial it raised RuntimeError: another number"):
        fastgrad.GradientFeatures(model)(x, weights)


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


def test_a_backward_that_needs_gradients_of_parameters() -> None:
    """Layers with rules lie on both sides of it, and the copies that run have parameters without gradients."""
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(Again.apply(net.inner, net.first(x), *net.inner.parameters())),
        first=nn.Linear(4, 5), inner=nn.Sequential(nn.Linear(5, 5), nn.Tanh()), head=nn.Linear(5, 3),
    ).double()  # fmt: skip
    x = torch.randn(5, 4).double()
    check_losses(model, lambda x: model(x).square().sum(1), x)
    _, features = fastgrad.GradientFeatures(model, loss="mse", target="uniform")(x)
    assert_exact(features, loss_norms(((model(one[None]) - 1 / 3).square().sum() for one in x), model))


def caught(net: Any, x: Tensor) -> Tensor:
    """What the first part computes leaves it by an exception."""
    try:
        h = net.first(x)
    except LookupError as error:
        h = error.args[0]
    return net.head(h.tanh() @ net.weight)


def leaving(net: Any, x: Tensor) -> Tensor:
    raise LookupError(net.layer(x))


def test_a_part_that_is_left_by_an_exception() -> None:
    torch.manual_seed(0)
    first, weight = Net(leaving, layer=nn.Linear(4, 5)), nn.Parameter(torch.randn(5, 5))
    model, x = Net(caught, first=first, weight=weight, head=nn.Linear(5, 3)).double(), torch.randn(5, 4).double()
    check_losses(model, lambda x: model(x).square().sum(1), x)


def bag(net: Any, tokens: Tensor) -> Tensor:
    """A bag of embeddings whose offsets are those of all samples together."""
    starts = torch.arange(len(tokens)) * tokens.shape[1]
    h = net.table(tokens.flatten(), starts) if net.offsets else net.table(tokens)
    return net.head(h.tanh())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
def test_bags_of_embeddings(sparse: bool, offsets: bool) -> None:
    torch.manual_seed(0)
    table, tokens = nn.EmbeddingBag(5, 4, mode="sum", sparse=sparse), torch.randint(0, 5, (6, 7))
    model = Net(bag, table=table, head=nn.Linear(4, 3), offsets=offsets).double()
    found = recorded(model, lambda: square(model, tokens).sum())
    model.table.sparse = False
    assert_exact(found, loss_norms((square(model, one[None]).sum() for one in tokens), model))


def unmapped(net: Any, tokens: Tensor) -> Tensor:
    """Layers of which PyTorch has no form for several samples under ``vmap``, each called twice."""
    h = net.cell(net.bag(tokens), net.cell(net.bag(tokens[:, :2]), tokens[:, :1].expand(-1, 4) / 5))
    return net.normed(h) + net.normed(h.tanh())


def test_pytorch_warns_of_its_own_vmaps_alone(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model = Net(unmapped, bag=nn.EmbeddingBag(5, 4), cell=nn.GRUCell(4, 4), normed=normed)
    tokens = torch.randint(5, (6, 3))
    pairs = [("bce", "ones"), ("cross_entropy", "ones")]
    extractor = fastgrad.GradientFeatures(model, signals=pairs)
    extractor(tokens)
    assert {route.route for route in extractor.report()} == {"fallback"}
    assert not recwarn
    torch.func.vmap(lambda one: model.bag(one[None]))(tokens)
    assert "performance drop" in str(recwarn.pop().message)


def mapped(net: Any, x: Tensor) -> Tensor:
    """What ``vmap`` does with a parameter, whose part in the answer is small, no mode sees."""
    h = torch.func.vmap(linear, (None, 0), 1)(x, net.weight).flatten(1)
    return net.head(net.misjudged(x).tanh() + 1e-2 * h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_plan_is_checked_in_any_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 3, 4))
    model = Net(mapped, weight=weight, misjudged=Misjudged(4, 6), head=nn.Linear(6, 3)).to(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    found = recorded(model, lambda: square(model, x).sum())
    truth = loss_norms((square(model, one).sum() for one in x.split(1)), model)
    torch.testing.assert_close(found.to(truth), truth, rtol=0.1, atol=0)


def hooked(net: Any, x: Tensor) -> Tensor:
    """One matrix twice, with a hook between."""
    h = net.between((x @ net.weight).tanh())
    if h.requires_grad and (net.way == "tensor" or (net.way == "training" and net.training)):
        h.register_hook(net.hook)
    elif net.way == "node" and h.grad_fn is not None:
        h.grad_fn.register_prehook(lambda gradients: tuple(map(net.hook, gradients)))
    return (h @ net.weight).tanh()


def with_hook(way: str, hook: Callable[[Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    model = Net(hooked, weight=nn.Parameter(torch.randn(4, 4)), between=nn.Tanh(), way=way, hook=hook).double()
    if way == "module":
        model.between.register_full_backward_hook(lambda _, gradients, __: tuple(map(hook, gradients)))
    return model


@pytest.mark.parametrize("way", ["tensor", "training", "node", "module"])
def test_hooks_that_change_large_gradients_alone(way: str) -> None:
    """``vmap`` leaves them out, which gradients as large as those of a trial do not show."""
    model = with_hook(way, lambda gradient: gradient.clamp(-5, 5))
    for samples in (4, 3):
        check_losses(model, lambda x: 50 * model(x).sum(1), torch.randn(samples, 4).double())


@pytest.mark.parametrize("way", ["tensor", "training", "node", "module"])
def test_hooks_that_change_nothing_at_first(way: str) -> None:
    gain = torch.ones((), dtype=torch.float64)
    model = with_hook(way, lambda gradient: gradient * gain)
    for value in (1, 3):
        gain.fill_(value)
        check_losses(model, lambda x: model(x).sum(1), torch.randn(4, 4).double())


def drawing(net: Any, x: Tensor) -> Tensor:
    return net.layer(x * torch.rand_like(x)) @ net.layer.weight


def squeezed(net: Any, x: Tensor) -> Tensor:
    return net.layer(x.squeeze()) @ net.layer.weight


def calling_itself(net: Any, x: Tensor, *, more: bool = True) -> Tensor:
    return net(net.layer(x), more=False) if more else net.layer(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (drawing, "other outputs when it is computed again, as with random numbers; give it these as an input"),
        (squeezed, r"outputs of another shape for a sample alone than for the batch, as with squeeze\(\)"),
        (calling_itself, "no part of it that is called once and contains all uses of 'layer.weight'"),
    ],
)
def test_what_a_sample_alone_cannot_give_is_refused_by_its_reason(
    function: Callable[..., Tensor], message: str
) -> None:
    model, x = Net(function, layer=nn.Linear(4, 4)).eval(), torch.randn(3, 1, 4)
    with pytest.raises(ValueError, match=message):
        recorded(model, lambda: model(x).sum())


def test_outputs_without_gradients_may_have_another_shape_for_a_sample_alone() -> None:
    model = Net(lambda net, x: (net.layer(x) @ net.layer.weight, x.squeeze()), layer=nn.Linear(4, 4)).double()
    check_losses(model, lambda x: model(x)[0].square().sum((1, 2)), torch.randn(3, 1, 4).double())


def test_an_attribute_that_has_a_row_for_each_sample_is_refused() -> None:
    model = Net(lambda net, x: (net.layer(x) + net.condition) @ net.layer.weight, layer=nn.Linear(4, 4)).double()
    # One row is for all.
    model.condition = torch.randn(1, 4).double()
    check_losses(model, lambda x: model(x).square().sum(1), torch.randn(3, 4).double())
    model.condition = torch.randn(3, 4).double()
    with pytest.raises(ValueError, match="with an attribute that has a row for each sample"):
        recorded(model, lambda: model(torch.randn(3, 4).double()).sum())
