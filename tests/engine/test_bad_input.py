"""Models and losses that have no gradient per sample, or change between two steps: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_oracle import relative_error, true_norms
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fastgrad


class Interacting(nn.Module):
    """Samples meet in a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h - h.mean(0))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(y)


def vectors(samples: int) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples)).double()


def squares(out: Tensor) -> Tensor:
    return (out + 1).square().sum(1)


def loop(model: nn.Module, x: Tensor) -> Tensor:
    return true_norms(model, (x,), lambda _, out: 2 * (out + 1))


def assert_exact(found: tuple[Tensor, ...], truth: Tensor) -> None:
    assert relative_error(torch.stack(found, 1), truth, 2e-16).max() < 1e-10


def recorded(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with fastgrad.record(model):
        return fastgrad.grad_sqnorm(squares(model(x)).sum(), list(model.parameters()))


def test_samples_that_interact_are_refused() -> None:
    model = Interacting().double()
    recorded(model, vectors(1))  # alone, a sample has nobody to meet
    with pytest.raises(ValueError, match="model must treat the samples of a batch independently"):
        recorded(model, vectors(5))
    with pytest.raises(ValueError, match="model must treat the samples of a batch independently"):
        fastgrad.GradientFeatures(model)(vectors(5))


def test_two_batch_sizes_in_one_call_are_refused() -> None:
    with (
        fastgrad.record(model := Towers().double()),
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
    assert_exact(first, loop(pair[0], x))
    assert_exact(second, loop(pair[1], y))


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
            assert_exact(found, loop(model, x))
            with torch.no_grad():
                model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"'weight' of '0' must not be modified in place"):
            fastgrad.grad_sqnorm(kept[0], list(model.parameters()))


def test_a_mean_divides_every_gradient() -> None:
    model, x = nn.Linear(4, 3).double(), vectors(5)
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(squares(model(x)).mean(), list(model.parameters()))
    assert_exact(tuple(25 * norms for norms in found), loop(model, x))


def test_samples_that_interact_before_a_head_of_zeros_are_refused() -> None:
    model, x = Interacting().double(), vectors(5)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"gradients of head\.weight change with the other samples"):
        recorded(model, x)


def test_samples_that_interact_before_heads_of_zeros_are_refused_once_they_have_learned() -> None:
    model, x = nn.Sequential(Interacting(), nn.Linear(3, 3)).double(), vectors(5)
    heads = model[0].head.weight, model[1].weight
    for weight in heads:
        nn.init.zeros_(weight)
    features = fastgrad.GradientFeatures(model)
    features(x)
    recorded(model, x)
    for weight in heads:
        nn.init.normal_(weight)
    with pytest.raises(ValueError, match="samples of a batch independently"):
        features(x)
    with pytest.raises(ValueError, match="samples of a batch independently"):
        recorded(model, x)


class Divided(nn.Module):
    """One number of one sample divides all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h / h.abs().max())


@pytest.mark.parametrize("largest", range(4))
def test_one_sample_that_decides_for_all_is_refused(largest: int) -> None:
    model, x = Divided().double().eval(), vectors(6)
    x[largest] *= 9
    with pytest.raises(ValueError, match="samples of a batch independently"):
        recorded(model, x)
    with pytest.raises(ValueError, match="samples of a batch independently"):
        fastgrad.GradientFeatures(model)(x)


def test_a_first_batch_that_is_not_finite() -> None:
    model, x = nn.Linear(4, 3).double(), vectors(6)
    bad = x.clone()
    bad[1] = torch.nan
    with pytest.raises(ValueError, match=r"finite gradients .* bias, weight held NaN"):
        recorded(model, bad)
    recorded(model, x)
    found = torch.stack(recorded(model, bad), 1)
    assert found.isnan().all(1).tolist() == [i == 1 for i in range(6)]
    with pytest.raises(ValueError, match=r"finite gradients .* weight held NaN or infinity, or have squared"):
        fastgrad.GradientFeatures(nn.Linear(4, 3))(vectors(6).float() * 1e20)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("entry", [fastgrad.GradientFeatures, fastgrad.record])
def test_parameters_that_are_not_seen_whole(entry: Any) -> None:
    for part, error, message in (
        (nn.Linear(4, 3, dtype=torch.complex64), TypeError, "real parameters; 'weight' was torch.complex64"),
        (nn.Sequential(nn.Linear(4, 3, device="meta")), ValueError, "'0.weight' was on the meta device"),
        (nn.Sequential(torch.jit.trace(nn.Linear(4, 3), torch.rand(2, 4))), TypeError, "ordinary modules; '0' was a"),
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


class Scaled(nn.Module):
    """A scale for each sample's features, in a module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ torch.diag(self.scale))


@pytest.mark.parametrize("layers", [[nn.Linear(4, 3)], [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)], [Scaled()]])
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
        assert_exact(found, loop(model, x.detach()))
        for one, other in zip(torch.autograd.grad(term, parameters, allow_unused=True), truth, strict=True):
            torch.testing.assert_close(one, other)


class Statistics(nn.Module):
    """A number of all samples, which no gradient passes."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.layer, self.head = of, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.of == "inputs":
            x = x - x.mean(0)
        h = self.layer(x)
        if self.of == "detached":
            h = h / h.detach().abs().max()
        return self.head(h) / (len(x) if self.of == "size" else 1)


@pytest.mark.parametrize("of", ["inputs", "detached", "size"])
@pytest.mark.parametrize("largest", [0, 2, 3])
def test_samples_that_interact_without_gradients_are_refused(of: str, largest: int) -> None:
    model, x = Statistics(of).double().eval(), vectors(6)
    x[largest] *= 9
    features = fastgrad.GradientFeatures(model)
    # Alone, a sample has nobody to meet.
    recorded(model, x[:1])
    features(x[:1])
    with pytest.raises(ValueError, match="samples of a batch independently; what it returns"):
        recorded(model, x)
    with pytest.raises(ValueError, match="samples of a batch independently; what it returns"):
        features(x)


class Unbound(nn.Linear):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(super().forward(x).unbind(0))


def test_one_output_for_each_sample_is_refused() -> None:
    model = Unbound(4, 3).double()
    with fastgrad.record(model), pytest.raises(ValueError, match="model must return tensors that carry the batch"):
        model(vectors(5))


class Hooked(nn.Module):
    """Gradients of hidden states that a hook changes, as for recurrent networks."""

    def __init__(self, hook: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.hook = nn.Linear(4, 4), nn.Linear(4, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h.register_hook(self.hook)
        return self.head(h)


def test_gradients_that_are_not_in_proportion_to_the_loss() -> None:
    model, x = Hooked(lambda gradient: gradient.clamp(-0.1, 0.1)).double().eval(), vectors(5)
    truth = torch.stack(
        [
            torch.stack([g.square().sum() for g in torch.autograd.grad(squares(model(row)).sum(), model.parameters())])
            for row in x.split(1)
        ]
    )
    assert_exact(recorded(model, x), truth)
    features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.full_like(z, -1))
    assert_exact(features(x)[1].unbind(1), truth)
    with (
        fastgrad.clip_gradients(model, 1.0) as clipped,
        pytest.raises(ValueError, match="model must have gradients in proportion to its losses"),
    ):
        clipped.backward(squares(model(x)))


@pytest.mark.parametrize(
    "hook",
    [
        lambda gradient: gradient / len(gradient),
        lambda gradient: gradient / gradient.norm(),
        lambda gradient: gradient / gradient.abs().max(),
        lambda gradient: gradient * (0.1 / gradient.norm()).clamp(max=1),
        lambda gradient: gradient / (1 + gradient.abs().max()),
        lambda gradient: gradient * 0.01 / (0.01 + gradient.abs().max()),
        lambda gradient: gradient * gradient.abs().max().tanh(),
    ],
    ids=[
        "the size of the batch",
        "its norm",
        "its largest",
        "its norm above a limit",
        "one and its largest",
        "its largest, to little",
        "its largest, where that is small",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_that_the_batch_divides_are_refused(hook: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model, x = Hooked(hook).to(dtype).eval(), vectors(5).to(dtype)
    recorded(model, x[:1])  # alone, a sample is the batch
    for take in (recorded, lambda model, x: fastgrad.GradientFeatures(model)(x)):
        with pytest.raises(ValueError, match=r"gradients of first\.bias.* change with the other samples"):
            take(model, x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_are_rounding_alone_are_no_samples_that_interact() -> None:
    torch.manual_seed(0)
    saturated = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(saturated, Mean(), nn.Linear(16, 3)).eval()
    _, norms = fastgrad.GradientFeatures(model)(1e4 * torch.randn(6, 7, 16))
    assert norms.isfinite().all()


class Crops(nn.Module):
    """Three crops of each image stand one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(0, (-1, 3)).mean(1)


class Conditional(nn.Module):
    """A branch of PyTorch's own, whose functions cannot be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def sine(x: Tensor) -> Tensor:
            return self.layer(x).sin()

        return torch.cond(x.sum() > 0, sine, self.layer, (x,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Crops, r"take any number of samples.* given 4 of 9 samples in a trial it raised RuntimeError: unflatten"),
        (Conditional, r"no torch\.cond.* given 3 of 9 samples in a trial it raised"),
    ],
)
def test_what_fails_in_a_trial_alone_is_refused_by_name(made: type[nn.Module], message: str) -> None:
    model = made().double()
    assert model(vectors(9)).isfinite().all()
    for take in (recorded, lambda model, x: fastgrad.GradientFeatures(model)(x)):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            take(model, vectors(9))


def test_what_all_samples_fail_with_is_the_models_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        recorded(Crops().double(), torch.ones(9, 5).double())


class Gated(nn.Module):
    """Residual layers whose gates sum over all features, and so cancel much of what was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 5)
        self.gates = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for gate, layer in zip(self.gates, self.layers, strict=True):
            x = x + gate * layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_that_autocast_rounds_are_no_samples_that_interact(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Gated(), torch.randn(6, 8)
    features = fastgrad.GradientFeatures(model)
    _, truth = features(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, norms = features(x)
    assert ((norms - truth).abs().amax(0) <= 0.1 * truth.amax(0)).all()
