"""Small networks, and the norms of every way to them held against each sample alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, relative_error
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import _pytree as pytree

import fastgrad


class Net(nn.Module):
    """A network with the attributes ``parts``, that gives ``function(network, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def parts(function: Callable[..., Any], **more: Any) -> Net:
    """A network in float64 and evaluation mode with two layers of three numbers, a head of two, and bare parameters.

    These have the same values in every network.
    """
    torch.manual_seed(0)
    made = {"layer": nn.Linear(3, 3), "other": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    bare = {"scale": nn.Parameter(torch.rand(3) + 0.5), "matrix": nn.Parameter(torch.randn(3, 3))}
    return Net(function, **{**made, **bare, **more}).double().eval()


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """``(B, P)``: squared norms of all parameters from ``record``, for a loss that is computed inside."""
    with fastgrad.record(model):
        return torch.stack(fastgrad.grad_sqnorm(loss(), list(model.parameters())), 1)


def assert_exact(found: Tensor, truth: Tensor) -> None:
    """Compare norms ``(B, P)`` in float64."""
    assert found.shape == truth.shape
    assert relative_error(found, truth, 2e-16).max() < 1e-10


def squares(out: Any) -> Tensor:
    """The sum of squares of all that a model returns."""
    floats = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    return sum((t.abs().square().sum() for t in floats), torch.zeros(()))


def check_losses(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor, eps: float = 2e-16) -> None:
    """Compare ``record`` and ``clip_gradients``, for the losses ``(B,)`` of a batch, with each sample alone."""
    truth = loss_norms((losses(row).sum() for row in x.split(1)), model)
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(losses(x).sum(), [p for p in model.parameters() if p.requires_grad])
    assert relative_error(torch.stack(found, 1), truth, eps).max() < 1e3 * eps
    with fastgrad.clip_gradients(model, 1e9) as clipped:
        norms = clipped.backward(losses(x))
    torch.testing.assert_close(norms, truth.sum(1).sqrt(), rtol=1e3 * eps, atol=0)


def one_by_one(model: nn.Module, args: Sequence[Any]) -> list[Any]:
    """What a copy of the model gives for each sample alone; inputs with as many rows as the first are cut."""
    samples = next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)).shape[0]
    outputs = []
    for i in range(samples):
        own, cut = copy.deepcopy(model, {id(p): p for p in model.parameters()}), {}
        for t in (t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            cut[id(t)] = (t[i : i + 1] if t.dim() and t.shape[0] == samples else t).clone()
        outputs.append(own(*pytree.tree_map_only(Tensor, functools.partial(_of, cut), tuple(args))))
    return outputs


def _of(cut: dict[int, Tensor], t: Tensor) -> Tensor:
    return cut[id(t)]


def alone(model: nn.Module, args: Sequence[Any]) -> Tensor:
    """``(B, P)``: norms of the gradients of each sample's sum of squares, alone."""
    none = 0 * sum(p.sum() for p in model.parameters())
    return loss_norms((squares(out) + none for out in one_by_one(model, args)), model)


def features_of_squares(model: nn.Module, chunk_size: int | None = None) -> fastgrad.GradientFeatures:
    return fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z), chunk_size=chunk_size)


def assert_norms(model: nn.Module, truth: Tensor, *args: Any, **named: Any) -> None:
    """``GradientFeatures`` and ``record`` give these norms for the sum of squares."""
    assert_exact(features_of_squares(model)(*args, **named)[1], truth)
    assert_exact(recorded(model, lambda: squares(model(*args, **named))), truth)


def check_several(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, gradients: Tensor) -> None:
    """Compare several gradients at once of what ``run`` makes of x with each of them and each sample."""
    parameters = list(model.parameters())
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(run(x), parameters, grad_outputs=gradients, is_grads_batched=True)
    for norms, at in zip(torch.stack(found, 2), gradients, strict=True):
        assert_exact(norms, loss_norms(((run(row) * g).sum() for row, g in zip(x.split(1), at, strict=True)), model))


def left(model: nn.Module) -> dict[str, Any]:
    """What calls may write to: attributes that are no modules, and values of buffers and parameters."""
    held = {f"{path}.{k}": v for path, m in model.named_modules() for k, v in vars(m).items() if k[0] != "_"}
    tensors = {name: t.detach().clone() for name, t in (*model.named_buffers(), *model.named_parameters())}
    return {k: copy.copy(v) for k, v in held.items() if type(v) in (int, float, str, bool, list, dict, set)} | tensors


def assert_same(found: Any, expected: Any) -> None:
    """Compare trees of values, tensors up to rounding."""
    one, other = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-12)
        else:
            assert a == b or isinstance(a, type(b))


def check(
    model: nn.Module,
    *calls: Sequence[Any],
    states: Iterable[dict[str, Any]] = (),
    features: bool = True,
    apart: bool = False,
) -> None:
    """Every call, by recording, by features and by features of chunks, against each sample alone.

    Before each call its state's attributes are set on the model. A recorded call leaves and returns what an ordinary
    one does, and one of features leaves the model as it was. If samples take paths ``apart``, outputs are those of each
    alone.
    """
    extractors = [features_of_squares(model), features_of_squares(model, chunk_size=2)] if features else []
    given = iter(states)
    for args in calls:
        vars(model).update(next(given, {}))
        truth, before = alone(model, args), left(model)
        for extractor in extractors:
            assert_exact(extractor(*copied(args))[1], truth)
            assert_same(left(model), before)
        plain = copy.deepcopy(model)
        expected = torch.cat(one_by_one(model, args)) if apart else plain(*copied(args))
        with fastgrad.record(model):
            output = model(*args)
            found = fastgrad.grad_sqnorm(squares(output), list(model.parameters()))
        assert_exact(torch.stack(found, 1), truth)
        assert_same(output, expected)
        assert_same(left(model), left(plain))


def copied(args: Sequence[Any]) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tuple(args))


def routes(model: nn.Module, *args: Any) -> dict[str, str]:
    """How `GradientFeatures` computes each parameter's norms."""
    extractor = fastgrad.GradientFeatures(model)
    extractor(*args)
    return {route.parameter: route.route for route in extractor.report()}


def reused(net: Any, x: Tensor) -> Any:
    """One linear function called three times, and its weight turned by a product from the left."""
    for _ in range(3):
        x = torch.tanh(net.linear(x))
    return x @ net.linear.weight * net.scale


def unrolled(net: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        h = net.cell(x[:, t], h)
    return h


def grouped(net: Any, x: Tensor) -> Any:
    """Samples take one of two paths by the sign of their first number."""
    h = net.one(x)
    if (x[:, 0] < 0).any():
        h = torch.where(x[:, :1] < 0, torch.tanh(net.two(x)), h)
    return net.last(h)


def by_nonzero(net: Any, x: Tensor) -> Any:
    """``nonzero`` has shapes that depend on data, so that samples run alone."""
    at = ((h := net.one(x)) > 0).nonzero(as_tuple=True)
    return net.last(torch.zeros_like(h).index_put(at, h[at]))


def tied(words: int) -> Net:
    return Net(lambda net, x: F.linear(torch.tanh(net.mix(net.table(x))), net.table.weight).mean(1),
               table=nn.Embedding(words, 5, padding_idx=1), mix=nn.Linear(5, 5))  # fmt: skip


def of_reused() -> Net:
    return Net(reused, linear=nn.Linear(6, 6), scale=nn.Parameter(torch.tensor(0.7)))


def of_paths(function: Any) -> Net:
    return Net(function, one=nn.Linear(6, 4), two=nn.Linear(6, 4), last=nn.Linear(4, 3))


def sequence(layer: nn.Module) -> Net:
    return Net(lambda net, x: net.inner(x)[0].sum(1), inner=layer)


#: Models of one layer or a few, and shapes of their inputs; of tokens with the number of words in front.
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "graph of fx": (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))), (6,)),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 6)),
    "many positions": (lambda: nn.Linear(3, 2), (60, 3)),
    "few positions": (lambda: nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3)), (2, 300)),
    "cancelling positions": (lambda: Net(
        lambda net, x: (h := net.layer(x[:, :1] + 0.03 * x)) - 0.97 * h.mean(1, keepdim=True), layer=nn.Linear(6, 5)),
        (4, 6)),
    "reused": (of_reused, (6,)),
    "reused, positions": (of_reused, (3, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 3, padding_idx=2), nn.Flatten(), nn.Linear(21, 2)), (-11, 7)),
    "embedding, sparse": (
        lambda: nn.Sequential(nn.Embedding(11, 3, sparse=True), nn.Flatten(), nn.Linear(21, 2)), (-11, 7)),
    "embedding, one index": (lambda: nn.Sequential(nn.Embedding(11, 3), nn.Flatten(), nn.Linear(3, 2)), (-11, 1)),
    "tied": (lambda: tied(11), (-11, 6)),
    "tied, large table": (lambda: tied(1000), (-1000, 2)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 2)), (3, 8, 8)),
    "conv, one position": (lambda: nn.Conv2d(30, 40, 3), (30, 3, 3)),
    "conv, dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=2, padding="same"), (3, 9)),
    "conv, pooled": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 4)),
    "conv, groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)), (4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (4, 5, 5)),
    "transposed, one position": (lambda: nn.ConvTranspose2d(40, 30, 2), (40, 1, 1)),
    "lstm": (lambda: sequence(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2)), (5, 3)),
    "gru": (lambda: sequence(nn.GRU(3, 4, batch_first=True)), (5, 3)),
    "unrolled cell": (lambda: Net(unrolled, cell=nn.GRUCell(3, 4)), (5, 3)),
    "norms": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4),
                              nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 4]), nn.RMSNorm(4)), (3, 6, 6)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        (3, 6, 6)),
    "layer norm": (
        lambda: nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8)), (-11, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (3, 4)),
    "copies": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), weight_norm(nn.Linear(4, 3))), (6,)),
    "groups": (lambda: of_paths(grouped), (6,)),
    "alone": (lambda: of_paths(by_nonzero), (6,)),
}  # fmt: skip


def build(name: str, samples: int = 5, seed: int = 0) -> tuple[Any, Tensor]:
    """Such a model in evaluation mode, and inputs."""
    torch.manual_seed(seed)
    make, shape = SMALL[name]
    model = make().eval()
    return model, torch.randint(-shape[0], (samples, *shape[1:])) if shape[0] < 0 else torch.randn(samples, *shape)


def waves(out: Tensor, *_: Tensor) -> Tensor:
    """Losses ``(B,)`` to which each number of the output adds in its own way."""
    out = out.flatten(1)
    return (out.sin() * torch.arange(1, out.shape[1] + 1)).sum(1)


class Clamped(torch.autograd.Function):
    """A function that clamps gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1e-2, 1e-2)
