"""Every layer rule against a per-sample float64 loop, over the layers' hyperparameters."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from gradient_oracle import check_module, loss_norms, true_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import Net, assert_exact, check, recorded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastgrad
from fastgrad.gradients.features import Route
from fastgrad.layers import RULES, register_rule
from fastgrad.layers.call import RuleError

# PyTorch's own advice, the second of a float32 layer without gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
few = settings(max_examples=12, deadline=None)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@few
@given(DTYPES, st.integers(1, 4), st.sampled_from([(), (1,), (3,), (2, 3), (40,)]), st.booleans(), st.integers(0, 99))
def test_linear(dtype: torch.dtype, samples: int, positions: tuple[int, ...], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(7, 5, bias=bias, dtype=dtype)
    check_module(layer, torch.randn(samples, *positions, 7, dtype=dtype), seed=seed)


@settings(max_examples=24, deadline=None)
@given(st.data())
def test_convolution(data: st.DataObject) -> None:
    rank, transposed = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    sizes = {name: tuple(data.draw(st.integers(*ends)) for _ in range(rank)) for name, ends in (
        ("kernel_size", (1, 3)), ("stride", (1, 2)), ("padding", (0, 2)), ("dilation", (1, 2)))}  # fmt: skip
    options: dict[str, Any] = {
        **sizes,
        "groups": data.draw(st.sampled_from([1, 2, 4])),
        "bias": data.draw(st.booleans()),
    }
    if transposed:
        options["padding"] = 0
        options["output_padding"] = tuple(data.draw(st.integers(0, s - 1)) for s in sizes["stride"])
    elif data.draw(st.booleans()):
        options |= {"padding": data.draw(st.sampled_from(["same", "valid"])), "stride": 1}
    if not transposed:
        options["padding_mode"] = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(DTYPES)
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")(4, 8, **options, dtype=dtype)
    check_module(layer, torch.randn(data.draw(st.integers(1, 3)), 4, *(6, 7, 5)[:rank], dtype=dtype))


def _random_statistics(module: nn.Module) -> nn.Module:
    for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
        if tensor.is_floating_point():
            low = 0.5 if name.endswith(("var", "weight")) else -1.0
            nn.init.uniform_(tensor, low, 1.5)
    return module


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4, eps=0.1), (3, 4)),
        (nn.BatchNorm1d(4, eps=0.1), (3, 4, 5)),
        (nn.BatchNorm2d(4, eps=0.1), (3, 4, 5, 6)),
        (nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
        (nn.SyncBatchNorm(4), (3, 4, 5)),
        (nn.InstanceNorm1d(4, eps=0.1, affine=True), (3, 4, 9)),
        (nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 6)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 6)),
        (nn.GroupNorm(2, 4), (3, 4)),
        (nn.GroupNorm(2, 4, eps=0.1), (3, 4, 5, 6)),
        (nn.LayerNorm(6, eps=0.1), (3, 6)),
        (nn.LayerNorm(6), (3, 5, 6)),
        (nn.LayerNorm((5, 6), bias=False), (3, 4, 5, 6)),
        (nn.RMSNorm(6), (3, 5, 6)),
        (nn.RMSNorm((5, 6), eps=1e-3), (3, 5, 6)),
        (nn.PReLU(), (3, 4, 5)),
        (nn.PReLU(4), (3, 4)),
        (nn.PReLU(4), (3, 4, 5, 2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_activations(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check_module(_random_statistics(module.to(dtype)), torch.randn(shape, dtype=dtype) + 0.3)
    if isinstance(module, nn.RMSNorm):
        # Half precision adds the rounding error of float32 alone.
        check_module(module.to(torch.bfloat16), (1e-2 * torch.randn(shape)).bfloat16(), eps=1e-4)
        module.to(dtype)


#: Layers, shapes of their inputs, and their formula's name; of a recurrent layer the sequence's.
LAYERS: list[tuple[nn.Module, tuple[int, ...], str]] = [
    (nn.Linear(4, 3), (3, 4), "linear"),
    (nn.Linear(4, 3), (3, 5, 4), "linear"),
    (nn.Conv2d(4, 3, 3), (3, 4, 5, 6), "convolution"),
    (nn.ConvTranspose1d(4, 3, 3), (3, 4, 5), "convolution"),
    (nn.BatchNorm1d(4), (3, 4), "batch norm (evaluation)"),
    (nn.BatchNorm2d(4), (3, 4, 5, 6), "batch norm (evaluation)"),
    (nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 6), "normalisation"),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 6), "batch norm (evaluation)"),
    (nn.GroupNorm(2, 4), (3, 4, 5, 6), "normalisation"),
    (nn.LayerNorm(6), (3, 5, 6), "normalisation"),
    (nn.RMSNorm(6), (3, 5, 6), "normalisation"),
    (nn.PReLU(4), (3, 4, 5), "copies"),
    (nn.Embedding(4, 6), (3, 5), "embedding"),
    (nn.LSTM(6, 4, 2, proj_size=3, batch_first=True), (3, 5, 6), "recurrent"),
    (nn.GRU(6, 4, bidirectional=True, batch_first=True), (3, 5, 6), "recurrent"),
    (nn.RNN(6, 4, batch_first=True), (3, 5, 6), "recurrent"),
    (nn.LSTMCell(6, 4), (3, 6), "recurrent"),
    (nn.GRUCell(6, 4), (3, 6), "recurrent"),
    (nn.RNNCell(6, 4), (3, 6), "recurrent"),
]  # fmt: skip


each_layer = pytest.mark.parametrize(
    ("module", "shape", "name"), LAYERS, ids=lambda given: repr(given) if isinstance(given, nn.Module) else ""
)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_add_half_precision_up_in_float32(
    module: nn.Module, shape: tuple[int, ...], name: str, dtype: torch.dtype
) -> None:
    """Squares and sums of numbers near 300 leave the range of float16."""
    made = torch.Generator().manual_seed(4)
    module = copy.deepcopy(module).to(dtype).eval()
    x: Tensor = ((3 if name == "recurrent" else 30) * torch.randn(shape, generator=made)).to(dtype)
    x = torch.randint(4, shape) if isinstance(module, nn.Embedding) else x
    g = (300 * torch.randn(first(module(x)).shape, generator=made)).to(dtype)
    with fastgrad.record(module):
        found = fastgrad.grad_sqnorm(first(module(x)), list(module.parameters()), grad_outputs=g)
    truth = true_norms(module, (x,), lambda i, _: g[i : i + 1], output=first)
    # The layer's own numbers are rounded to half; the sums over them are not.
    rtol = 64 * torch.finfo(dtype).eps if name in ("copies", "recurrent") else 1e-3
    for norms, true in zip(found, truth.T, strict=True):
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms.double(), true, rtol=rtol, atol=1e-3 * float(true.max()))


@each_layer
def test_layers_have_a_formula(module: nn.Module, shape: tuple[int, ...], name: str) -> None:
    x = torch.randint(4, shape) if isinstance(module, nn.Embedding) else torch.randn(shape)
    taken = Net(lambda net, x: first(net.inner(x)), inner=copy.deepcopy(module))
    for route in _routes(taken, x):
        # Recurrent layers are linear functions, called once for each step.
        assert name in (route.reason, route.route) or (name == "recurrent" and route.reason.endswith("linear"))


@few
@given(st.sampled_from([(), (1,), (9,), (2, 5)]), st.sampled_from([None, 0, 2]), st.integers(0, 99))
def test_embedding(positions: tuple[int, ...], padding_idx: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    check_module(nn.Embedding(4, 5, padding_idx=padding_idx), torch.randint(0, 4, (3, *positions)), seed=seed)


def attended(net: Any, x: Tensor) -> Tensor:
    """Self- or cross-attention of one batch-first input."""
    key, value, options = net.memory(x), net.values(x), dict(net.options)
    if options.pop("padding", False):
        options["key_padding_mask"] = x[..., 0] > 0.8
    if options.pop("each", False):
        # A mask for every sample and head.
        options["attn_mask"] = x[:, None, :, 0].expand(-1, 7, -1).repeat_interleave(net.attention.num_heads, 0)
    mask = options.get("attn_mask")
    if isinstance(mask, Tensor) and mask.is_floating_point():
        options["attn_mask"] = mask.to(x.dtype)
    swap = (lambda t: t) if net.attention.batch_first else (lambda t: t.transpose(0, 1))
    out, weights = net.attention(*map(swap, (x, key, value)), **options)
    return swap(out) if weights is None else torch.cat([swap(out).flatten(1), weights.flatten(1)], 1)


FIRST, PLAIN = {"batch_first": True}, {"need_weights": False}
#: Options of the layer, and of its call.
ATTENTION: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (FIRST, PLAIN),
    ({"bias": False}, {"average_attn_weights": False}),
    ({"add_bias_kv": True, **FIRST}, PLAIN),
    ({"add_bias_kv": True, "add_zero_attn": True}, {"padding": True}),
    ({"kdim": 5, "vdim": 6, **FIRST}, PLAIN),
    (FIRST, {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True}),
    (FIRST, {"attn_mask": torch.eye(7).bool(), **PLAIN}),
    (FIRST, {"each": True, **PLAIN}),
    # The first position attends to none, as padding on the left does before a causal mask.
    (FIRST, {"attn_mask": torch.ones(7, 7).bool().triu(), **PLAIN}),
]


@pytest.mark.parametrize(("attention", "options"), ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention(attention: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(8, 2, **attention)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    memory, values = nn.Linear(8, module.kdim), nn.Linear(8, module.vdim)
    wrapped = Net(attended, attention=module, options=options, memory=memory, values=values).to(dtype)
    x = torch.randn(3, 7, 8, dtype=dtype)
    check_module(wrapped, x)
    assert {r.parameter: r.route for r in _routes(wrapped, x)}["attention.out_proj.weight"] == "rule"


def _routes(module: nn.Module, x: Tensor) -> list[Route]:
    model = nn.Sequential(module, nn.Flatten(), nn.LazyLinear(3)).to(
        x.dtype if x.is_floating_point() else torch.float32
    )
    with torch.no_grad():
        model(x)
    extractor = fastgrad.GradientFeatures(model)
    extractor(x)
    routes = (r for r in extractor.report() if r.parameter.startswith("0."))
    return [dataclasses.replace(r, parameter=r.parameter.removeprefix("0.")) for r in routes]


def recurrent(net: Any, x: Tensor) -> Tensor:
    """Output and final states of a recurrent layer, for a batch-first input."""
    layer, state = net.layer, None
    if net.with_state:
        seed = x[:, 0, :1].unsqueeze(0).repeat(layer.num_layers * (2 if layer.bidirectional else 1), 1, 1)
        hidden = seed.repeat(1, 1, layer.proj_size or layer.hidden_size)
        state = (hidden, seed.repeat(1, 1, layer.hidden_size)) if layer.mode == "LSTM" else hidden
    out, last = layer(x if layer.batch_first else x.transpose(0, 1), state)
    out = out if layer.batch_first else out.transpose(0, 1)
    last = last if isinstance(last, tuple) else (last,)
    return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in last)], 1)


RECURRENT = [
    (nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {}), (nn.RNN, {"nonlinearity": "tanh"}),
    (nn.RNN, {"nonlinearity": "relu"}),
]  # fmt: skip
OPTIONS = {"num_layers": st.integers(1, 2), "dtype": DTYPES}
OPTIONS |= {name: st.booleans() for name in ("bias", "batch_first", "bidirectional")}


@settings(few, max_examples=20)
@given(st.sampled_from(RECURRENT), st.fixed_dictionaries(OPTIONS), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_recurrent(kind: Any, options: dict[str, Any], length: int, with_state: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = kind[0](4, 3, **options, **kind[1])
    check_module(Net(recurrent, layer=layer, with_state=with_state), torch.randn(3, length, 4, dtype=options["dtype"]))


def test_a_recurrent_layer_that_begins_with_a_parameter() -> None:
    torch.manual_seed(0)
    layer, start = nn.GRU(4, 3, batch_first=True), nn.Parameter(torch.randn(1, 1, 3))
    check_module(Net(lambda net, x: net.layer(x, net.start)[0], layer=layer, start=start), torch.randn(1, 5, 4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scale * x)


class OwnRule(Scale):
    """A type for which a rule is registered."""


class Subclass(OwnRule):
    """Computes as its class does."""


class Negative(OwnRule):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_a_registered_rule_is_used() -> None:
    @register_rule(OwnRule, name="own")
    def own(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        out = torch.sigmoid(module.scale * a)
        return {"scale": (g * a * out * (1 - out)).flatten(1).sum(1).square()}

    torch.manual_seed(0)
    check_module(OwnRule(), torch.randn(3, 4))
    assert _routes(OwnRule(), torch.randn(3, 4))[0].reason == "own"
    # Used twice, its gradients come from autograd; a subclass with a forward of its own is none of it.
    twice = OwnRule()
    check_module(nn.Sequential(twice, nn.Linear(4, 4), twice), torch.randn(3, 4))
    assert _routes(nn.Sequential(twice, twice), torch.randn(3, 4))[0].reason == "used 2 times: own"
    assert _routes(Subclass(), torch.randn(3, 4))[0].reason == "own"
    assert _routes(Negative(), torch.randn(3, 4))[0].route == "copies"
    check_module(Negative(), torch.randn(3, 4))
    # It does not apply where a sample has several rows, or inputs have names.
    for use in (
        lambda net, x: net.own(torch.cat([x, 2 * x])).unflatten(0, (2, -1)).sum(0),
        lambda net, x: net.own(x=x),
    ):
        check_module(Net(use, own=OwnRule()), torch.randn(3, 4))


def test_an_error_of_a_rule_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, torch.sigmoid, lambda call, x: call.misspelt(x))
    net = Scale()
    with pytest.raises(RuleError, match=r"a layer rule raised AttributeError: .*misspelt"), fastgrad.record(net):
        net(torch.randn(3, 4))


@pytest.mark.parametrize("module", [Scale(), nn.Bilinear(4, 4, 3), nn.EmbeddingBag(5, 3)], ids=repr)
def test_layers_without_a_rule(module: nn.Module) -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        x = x.abs().long().clamp(max=4) if isinstance(module, nn.EmbeddingBag) else x
        return first(net.inner(x, x) if isinstance(module, nn.Bilinear) else net.inner(x))

    torch.manual_seed(0)
    check_module(Net(function, inner=module), torch.randn(3, 4))


def test_the_registry_is_reached_from_the_package() -> None:
    code = "import fastgrad; print(fastgrad.layers.register_rule.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "fastgrad.layers.registry\n"


def test_cancelling_rows_of_a_table_keep_their_accuracy() -> None:
    """Gradients that nearly cancel over positions with one index, where a Gram matrix sums terms of both signs."""
    torch.manual_seed(0)
    table, index = nn.Embedding(3, 5), torch.tensor([[0, 0, 0, 0], [1, 2, 1, 2], [2, 0, 2, 2]])
    gradient = torch.randn(3, 4, 5)
    for word in range(3):
        same = (index == word).unsqueeze(2) * 1.0
        gradient -= same * (gradient * same).sum(1, keepdim=True) / same.sum(1, keepdim=True).clamp(min=1) * (1 - 1e-3)
    with fastgrad.record(table):
        (found,) = fastgrad.grad_sqnorm(table(index), table.weight, grad_outputs=gradient)
    truth = true_norms(table, (index,), lambda i, _: gradient[i : i + 1])[:, 0]
    assert ((found - truth).abs() / truth).max() < 1e-3


def tokens(net: Any, x: Tensor) -> Tensor:
    """Convolutional features as a sequence of tokens, tokens first, as PyTorch's attention takes them by default."""
    tokens = net.norm(net.convolution(x)).flatten(2).permute(2, 0, 1)
    return net.head(net.token(tokens).tanh().sum(0))


def lying(net: Any, x: Tensor) -> Tensor:
    """A norm whose input lies transposed, as does its gradient."""
    h = net.norm((net.convolution(x) * net.scale).transpose(1, 2).contiguous().transpose(1, 2))
    return net.head(h.transpose(2, 3).contiguous().tanh().transpose(2, 3).sum((2, 3)))


def as_usual(net: Any, x: Tensor) -> Tensor:
    """The norm where inputs and gradients lie in order, as PyTorch has it right."""
    out = net.norm(x.contiguous())
    out.register_hook(lambda gradient: gradient.contiguous())
    return out


@pytest.mark.parametrize("function", [tokens, lying])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)], ids=repr)
@pytest.mark.parametrize("last", [False, True])
def test_one_sample_alone_and_in_a_batch(function: Any, norm: nn.Module, last: bool) -> None:
    """Where inputs or gradients lie transposed, PyTorch's own gradients of a batch of one are wrong on a CPU."""
    torch.manual_seed(0)
    parts = {"convolution": nn.Conv2d(3, 4, 3), "token": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    model = Net(function, norm=_random_statistics(norm), scale=nn.Parameter(torch.rand(4, 1, 1)), **parts)
    model, x = model.double().eval(), torch.randn(3, 3, 6, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    plain.norm = Net(as_usual, norm=plain.norm)
    truth = loss_norms(plain(x).square().sum(1), plain)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    assert_exact(recorded(model, lambda: model(x).square().sum()), truth)
    alone = [recorded(model, lambda row=row: model(row).square().sum()) for row in x.split(1)]
    assert_exact(torch.cat(alone), truth)


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = pack_padded_sequence(x, lengths, batch_first=True)
    return net.head(net.body(sequences)[1][0])


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_packed_sequences(samples: int) -> None:
    model = Net(packed, body=nn.GRU(3, 3, batch_first=True), head=nn.Linear(3, 2)).double()
    check(model, (torch.randn(samples, 6, 3).double(), torch.arange(6, 6 - samples, -1)))


def test_batch_norm_with_channels_last_gradient() -> None:
    """PyTorch's own backward pass is wrong there (2.13, CPU), so a loop is no reference; the row of a batch is."""
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 5, 2, 2), "norm": nn.BatchNorm2d(5), "head": nn.Linear(5, 3)}
    model = Net(lambda net, x: net.head(net.norm(net.conv(x)).flatten(2).mT.tanh().square().mean(1)), **parts)
    model, x = model.double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for signals in ([("bce", "ones")], [("bce", "ones"), ("mse", "uniform")]):
        extractor = fastgrad.GradientFeatures(model, signals=signals)
        torch.testing.assert_close(extractor(x[:1])[1], extractor(x)[1][:1], rtol=1e-12, atol=0)


class Doubled(torch.autograd.Function):
    """A function that vmap refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_batch_norm_of_samples_that_run_alone() -> None:
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 5, 2, 2), "norm": nn.BatchNorm2d(5), "head": nn.Linear(5, 3)}
    model = Net(
        lambda net, x: net.head(Doubled.apply(net.norm(net.conv(x)).flatten(2).mT).tanh().square().mean(1)), **parts
    )
    model, x = model.double().eval(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    truth = loss_norms(model(x).square().sum(1), model)
    assert_exact(recorded(model, lambda: model(x).square().sum()), truth)
