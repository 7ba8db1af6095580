"""Models and losses that have no gradient per sample, or change between two steps: right, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms, true_norms
from small_nets import Net, assert_exact, recorded
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fastgrad


def small(function: Callable[..., Any]) -> Net:
    """Four numbers, four hidden ones, three classes."""
    return Net(function, first=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()


def interacting(net: Any, x: Tensor) -> Tensor:
    """Samples meet in a mean, of other numbers in training mode."""
    h = net.first(2 * x if net.training else x).tanh()
    return net.head(h - h.mean(0))


def vectors(samples: int) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples)).double()


def squares(out: Tensor) -> Tensor:
    return (out + 1).square().sum(1)


def loop(model: nn.Module, x: Tensor) -> Tensor:
    return true_norms(model, (x,), lambda _, out: 2 * (out + 1))


def norms_of(model: nn.Module, x: Tensor) -> Tensor:
    return recorded(model, lambda: squares(model(x)).sum())


def assert_refused(
    model: nn.Module, x: Tensor, message: str, features: fastgrad.GradientFeatures | None = None
) -> None:
    """Both ways to norms refuse a batch."""
    for call in (functools.partial(norms_of, model), features or fastgrad.GradientFeatures(model)):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_samples_that_interact_are_refused() -> None:
    model = small(interacting)
    norms_of(model, vectors(1))  # alone, a sample has nobody to meet
    assert_refused(model, vectors(5), "model must treat the samples of a batch independently")
    drawing = small(lambda net, x: net.head(net.first(x) * torch.rand(4, generator=net.own)))
    drawing.own = torch.Generator().manual_seed(0)
    assert_refused(drawing, vectors(5), "changes .* or each time, as with a generator of its own")


def test_errors_of_a_later_backward_pass_stay() -> None:
    def guarded(net: Any, x: Tensor) -> Tensor:
        def guard(gradient: Tensor) -> None:
            if gradient[3].any():
                raise RuntimeError("a gradient of the fourth sample")

        out = net.first(x)
        out.register_hook(guard)
        return out.tanh()

    with pytest.raises(RuntimeError, match=r"^a gradient of the fourth sample$"):
        norms_of(small(guarded), vectors(5))


def test_two_batch_sizes_in_one_call_are_refused() -> None:
    with (
        fastgrad.record(model := Net(lambda net, x, y: (net.layer(x), net.layer(y)), layer=nn.Linear(4, 3)).double()),
        pytest.raises(ValueError, match=r"model must treat the samples .* all uses of 'layer.weight'"),
    ):
        model(vectors(8), vectors(16))


def test_two_batch_sizes_in_two_calls_are_right() -> None:
    torch.manual_seed(0)
    pair, x, y = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double(), vectors(8), vectors(16)
    with fastgrad.record(pair):
        loss = squares(pair[0](x)).sum() + squares(pair[1](y)).sum()
        first = fastgrad.grad_sqnorm(loss, list(pair[0].parameters()), retain_graph=True)
        second = fastgrad.grad_sqnorm(loss, list(pair[1].parameters()))
    assert_exact(torch.stack(first, 1), loop(pair[0], x))
    assert_exact(torch.stack(second, 1), loop(pair[1], y))


def test_a_parameter_edited_between_forward_and_norms_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    with fastgrad.record(model):
        loss = squares(model(vectors(5))).sum()
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"'weight' of '0' must not be modified in place"):
            fastgrad.grad_sqnorm(loss, list(model.parameters()))


def test_an_earlier_call_that_the_loss_does_not_depend_on_may_be_out_of_date() -> None:
    model, x, kept = nn.Sequential(nn.Linear(4, 3)).double(), vectors(5), []
    with fastgrad.record(model):
        for _ in range(2):
            kept.append(squares(model(x)).sum())
            found = fastgrad.grad_sqnorm(kept[-1], list(model.parameters()), retain_graph=True)
            assert_exact(torch.stack(found, 1), loop(model, x))
            with torch.no_grad():
                model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"'weight' of '0' must not be modified in place"):
            fastgrad.grad_sqnorm(kept[0], list(model.parameters()))


def test_a_mean_divides_every_gradient() -> None:
    model, x = nn.Linear(4, 3).double(), vectors(5)
    assert_exact(25 * recorded(model, lambda: squares(model(x)).mean()), loop(model, x))


def test_samples_that_interact_before_a_head_of_zeros_are_refused() -> None:
    model, x = small(interacting), vectors(5)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"gradients of head\.weight change with the other samples"):
        norms_of(model, x)


def test_samples_that_interact_before_heads_of_zeros_are_refused_once_they_have_learned() -> None:
    model, x = nn.Sequential(small(interacting), nn.Linear(3, 3)).double(), vectors(5)
    heads = model[0].head.weight, model[1].weight
    for weight in heads:
        nn.init.zeros_(weight)
    features = fastgrad.GradientFeatures(model)
    features(x)
    norms_of(model, x)
    for weight in heads:
        nn.init.normal_(weight)
    assert_refused(model, x, "samples of a batch independently", features)


@pytest.mark.parametrize("largest", range(4))
def test_one_sample_that_decides_for_all_is_refused(largest: int) -> None:
    def divided(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.head(h / h.abs().max())

    x = vectors(6)
    x[largest] *= 9
    assert_refused(small(divided).eval(), x, "samples of a batch independently")


def test_a_first_batch_that_is_not_finite() -> None:
    model, x = nn.Linear(4, 3).double(), vectors(6)
    bad = x.clone()
    bad[1] = torch.nan
    with pytest.raises(ValueError, match=r"finite gradients .*; those of weight held NaN"):
        norms_of(model, bad)
    norms_of(model, x)
    assert norms_of(model, bad).isnan().all(1).tolist() == [i == 1 for i in range(6)]
    with pytest.raises(ValueError, match=r"finite gradients .* weight held NaN or infinity, or have squared"):
        fastgrad.GradientFeatures(nn.Linear(4, 3))(vectors(6).float() * 1e20)


def test_gradients_that_are_never_finite_where_rows_are_gathered() -> None:
    def rooted(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        h = h + (h - h).sqrt()
        order = h.sum(1).argsort()
        return net.head(h[order])[order.argsort()]

    assert_refused(small(rooted).eval(), vectors(6), r"finite gradients .*; those of first.bias, first.weight held NaN")


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("entry", [fastgrad.GradientFeatures, fastgrad.record])
def test_parameters_that_are_not_seen_whole(entry: Any) -> None:
    for part, error, message in (
        (nn.Linear(4, 3, dtype=torch.complex64), TypeError, "real parameters; 'weight' was torch.complex64"),
        (nn.Sequential(nn.Linear(4, 3, device="meta")), ValueError, "'0.weight' was on the meta device"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' was not initialized \(call a lazy module once"),
        (nn.Sequential(torch.jit.trace(nn.Linear(4, 3), torch.rand(2, 4))), TypeError, "ordinary modules; '0' was a"),
        (torch.jit.trace(nn.Linear(4, 3), torch.rand(2, 4)), TypeError, "ordinary modules; 'model' was a"),
    ):
        with pytest.raises(error, match=message):
            entry(part)


@pytest.fixture
def process() -> Iterator[None]:
    """One process of a group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process")
def test_parameters_that_become_parts() -> None:
    whole, x = nn.Linear(4, 3).double(), vectors(5)
    features = fastgrad.GradientFeatures(whole)
    features(x)
    fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))
    for sharded in (whole, FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))):
        for entry in (fastgrad.GradientFeatures, fastgrad.record):
            with pytest.raises(TypeError, match=r"must hold whole parameters; .* was a (DTensor|FullySharded)"):
                entry(sharded)
    with pytest.raises(TypeError, match="must hold whole parameters; 'weight' was a DTensor"):
        features(x)


def test_transforms_of_functions_inside_a_recording() -> None:
    model, x = nn.Linear(4, 3).double(), vectors(6)
    own = dict(model.named_parameters())

    def total(values: dict[str, Tensor]) -> Tensor:
        return squares(torch.func.functional_call(model, values, (x,))).sum()

    with fastgrad.record(model):
        found = torch.func.grad(total)(own)
        assert torch.equal(torch.func.vmap(model)(x), model(x))
    truth = torch.autograd.grad(squares(model(x)).sum(), list(own.values()))
    torch.testing.assert_close(tuple(found.values()), truth)


def scaled(net: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ torch.diag(net.scale))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(4, 3)],
        [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)],
        [Net(scaled, scale=nn.Parameter(torch.rand(4)))],  # without a rule
    ],
)
def test_a_penalty_of_gradients_is_refused(layers: list[nn.Module]) -> None:
    model, x = nn.Sequential(*layers).double(), vectors(5).requires_grad_()
    parameters = list(model.parameters())

    def penalty() -> tuple[Tensor, Tensor]:
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out, gradient.square().sum()

    truth = torch.autograd.grad(penalty()[1], parameters, allow_unused=True)
    with fastgrad.record(model):
        out, term = penalty()
        with pytest.raises(ValueError, match=r"outputs must .* gradient"):
            fastgrad.grad_sqnorm(term + out.sum(), parameters, retain_graph=True)
        # What depends on no gradient is found, and autograd's own passes are as always.
        found = fastgrad.grad_sqnorm(squares(out).sum(), parameters, retain_graph=True)
        assert_exact(torch.stack(found, 1), loop(model, x.detach()))
        for one, other in zip(torch.autograd.grad(term, parameters, allow_unused=True), truth, strict=True):
            torch.testing.assert_close(one, other)


def detached(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.head(h / h.detach().abs().max())


#: Numbers of all samples, which no gradient passes.
STATISTICS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "inputs": lambda net, x: net.head(net.first(x - x.mean(0))),
    "detached": detached,
    "size": lambda net, x: net.head(net.first(x)) / len(x),
}


@pytest.mark.parametrize("of", STATISTICS)
@pytest.mark.parametrize(("samples", "largest"), [(6, 0), (6, 2), (6, 3), (3, 0), (3, 1), (3, 2), (2, 0), (2, 1)])
def test_samples_that_interact_without_gradients_are_refused(of: str, samples: int, largest: int) -> None:
    model, x = small(STATISTICS[of]).eval(), vectors(samples)
    x[largest] *= 9
    features = fastgrad.GradientFeatures(model)
    # Alone, a sample has nobody to meet.
    norms_of(model, x[:1])
    features(x[:1])
    assert_refused(model, x, "samples of a batch independently; what it returns", features)


@pytest.mark.parametrize("joined", [lambda h: h.square().sum(), lambda h: h @ h.mT, lambda h: h[1:] * h[:-1]])
def test_outputs_without_the_batch_are_refused(joined: Callable[[Tensor], Tensor]) -> None:
    model = small(lambda net, x: joined(net.head(net.first(x))))
    assert_refused(model, vectors(5), "must return a floating-point tensor that carries the batch")


@pytest.mark.parametrize("write", [lambda net, x: net.count.add_(1), lambda net, x: x.relu_()])
def test_what_a_path_writes_is_refused_until_the_path_is_planned(write: Callable[[Any, Tensor], Tensor]) -> None:
    def forked(net: Any, x: Tensor) -> Tensor:
        if net.on:
            write(net, x)
        return net.head(x) if net.on else net.first(x)

    model, x = small(forked).eval(), vectors(5)
    model.count, model.on = nn.Buffer(torch.zeros(())), False
    features = fastgrad.GradientFeatures(model)
    features(x)
    norms_of(model, x)
    model.on = True
    assert_refused(model, x, "must not write to its .* in a call whose path was not seen before", features)
    assert_exact(norms_of(model, x), loop(model, x))
    features(x)


def test_one_output_for_each_sample_is_refused() -> None:
    model = Net(lambda net, x: list(net.layer(x).unbind(0)), layer=nn.Linear(4, 3)).double()
    with fastgrad.record(model), pytest.raises(ValueError, match="model must return tensors that carry the batch"):
        model(vectors(5))


def hooked(hook: Callable[[Tensor], Tensor]) -> Net:
    """Gradients of hidden states that a hook changes, as for recurrent networks."""

    def function(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.first(x))
        h.register_hook(hook)
        return net.head(h)

    return small(function).eval()


def test_gradients_that_are_not_in_proportion_to_the_loss() -> None:
    model, x = hooked(lambda gradient: gradient.clamp(-0.1, 0.1)), vectors(5)
    truth = loss_norms((squares(model(row)).sum() for row in x.split(1)), model)
    assert_exact(norms_of(model, x), truth)
    features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.full_like(z, -1))
    assert_exact(features(x)[1], truth)
    with (
        fastgrad.clip_gradients(model, 1.0) as clipped,
        pytest.raises(ValueError, match="model must have gradients in proportion to its losses"),
    ):
        clipped.backward(squares(model(x)))


DIVIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "the size of the batch": lambda gradient: gradient / len(gradient),
    "its norm": lambda gradient: gradient / gradient.norm(),
    "its largest": lambda gradient: gradient / gradient.abs().max(),
    "its norm above a limit": lambda gradient: gradient * (0.1 / gradient.norm()).clamp(max=1),
    "one and its largest": lambda gradient: gradient / (1 + gradient.abs().max()),
    "its largest, to little": lambda gradient: gradient * 0.01 / (0.01 + gradient.abs().max()),
    "its largest, where that is small": lambda gradient: gradient * gradient.abs().max().tanh(),
}


@pytest.mark.parametrize("by", DIVIDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_that_the_batch_divides_are_refused(by: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = hooked(DIVIDED[by]).to(dtype), vectors(5).to(dtype)
    norms_of(model, x[:1])  # alone, a sample is the batch
    assert_refused(model, x, r"gradients of first\.bias.* change with the other samples")


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_are_rounding_alone_are_no_samples_that_interact() -> None:
    torch.manual_seed(0)
    saturated = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = Net(lambda net, x: net.head(net.body(x).mean(1)), body=saturated, head=nn.Linear(16, 3)).eval()
    _, norms = fastgrad.GradientFeatures(model)(1e4 * torch.randn(6, 7, 16))
    assert norms.isfinite().all()


def crops(net: Any, x: Tensor) -> Tensor:
    """Three crops of each image stand one behind the other."""
    return net.layer(x).unflatten(0, (-1, 3)).mean(1)


def conditional(net: Any, x: Tensor) -> Tensor:
    """A branch of PyTorch's own, whose functions cannot be watched."""
    return torch.cond(x.sum() > 0, lambda x: net.layer(x).sin(), net.layer, (x,))


def several(net: Any, x: Tensor) -> Tensor:
    """Takes no sample alone, where a parameter is not a layer's own."""
    if len(x) < 2:
        raise RuntimeError("two samples at least")
    return x @ net.layer.weight.T


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (several, r"bear to run again on single samples.* in a trial it raised RuntimeError: two samples at least"),
        (crops, r"take any number of samples.* given 4 of 9 samples in a trial it raised RuntimeError: unflatten"),
        (conditional, r"no torch\.cond.* given 3 of 9 samples in a trial it raised"),
    ],
)
def test_what_fails_in_a_trial_alone_is_refused_by_name(function: Callable[..., Tensor], message: str) -> None:
    model = Net(function, layer=nn.Linear(4, 3)).double()
    assert model(vectors(9)).isfinite().all()
    assert_refused(model, vectors(9), f"(?s){message}")


def test_inputs_of_one_tensor_a_sample_are_refused() -> None:
    model = Net(lambda net, xs: torch.stack([net.layer(x).mean(0) for x in xs]), layer=nn.Linear(4, 3)).double()
    with (
        fastgrad.record(model),
        pytest.raises(ValueError, match=r"the rows of its first input tensor.* takes a tensor for each sample"),
    ):
        model([vectors(5), vectors(6)])


def test_what_all_samples_fail_with_is_the_models_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        norms_of(Net(crops, layer=nn.Linear(4, 3)).double(), torch.ones(9, 5).double())


def gated(net: Any, x: Tensor) -> Tensor:
    """Residual layers whose gates sum over all features, and so cancel much of what was rounded."""
    for gate, layer in zip(net.gates, net.layers, strict=True):
        x = x + gate * layer(x).relu()
    return net.head(x)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_that_autocast_rounds_are_no_samples_that_interact(seed: int) -> None:
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    model = Net(gated, layers=layers, head=nn.Linear(8, 5), gates=nn.Parameter(torch.zeros(4)))
    x = torch.randn(6, 8)
    features = fastgrad.GradientFeatures(model)
    _, truth = features(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, norms = features(x)
    assert ((norms - truth).abs().amax(0) <= 0.1 * truth.amax(0)).all()
