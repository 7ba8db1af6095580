"""clip_gradients: its gradients and norms are those of a float64 loop over samples, or it refuses by name."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import clipped_gradients, loss_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastgrad

CLASSES, EPS = 5, torch.finfo(torch.float32).eps


def texts(layer: nn.Module, *, sparse: bool = False, width: int = 8) -> Net:
    """Token indices ``(B, 6)`` through a layer ``(B, 6, 8)`` to logits."""

    def function(net: Any, x: Tensor) -> Tensor:
        out = net.layer(net.tokens(x))
        out = out[0] if isinstance(out, tuple) else out
        return net.head(out.tanh().mean(1))

    return Net(function, tokens=nn.Embedding(11, 8, sparse=sparse), layer=layer, head=nn.Linear(width, CLASSES))


def attended(dropout: float = 0.0) -> Net:
    attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
    return Net(lambda net, x: net.attention(x, x, x, need_weights=False)[0], attention=attention)


def tied() -> Net:
    """One weight for the first and the last layer, another used twice, a parameter that is broadcast."""

    def function(net: Any, x: Tensor) -> Tensor:
        hidden = net.twice(net.twice(net.tokens(x % CLASSES) + net.shift).tanh())
        return F.linear(hidden, net.tokens.weight).mean(1)

    shift = nn.Parameter(torch.randn(1, 1, 8))
    return Net(function, tokens=nn.Embedding(CLASSES, 8), twice=nn.Linear(8, 8), shift=shift)


def image_model(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: image_model(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
    "strided and grouped": lambda: image_model(nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, groups=2), nn.PReLU(4)),
    "transposed": lambda: image_model(nn.ConvTranspose2d(2, 4, 3), nn.Tanh()),
    "group norm": lambda: image_model(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
    "instance norm": lambda: image_model(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)),
    "batch norm in evaluation mode": lambda: image_model(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval()),
    "frozen first layer": lambda: image_model(nn.Conv2d(2, 4, 3).requires_grad_(False), nn.GroupNorm(2, 4)),
}  # fmt: skip
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: texts(nn.Linear(8, 8)),
    "sparse": lambda: texts(nn.Linear(8, 8), sparse=True),
    "layer norm": lambda: texts(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))),
    "attention": lambda: texts(attended()),
    "transformer": lambda: texts(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
    "LSTM": lambda: texts(nn.LSTM(8, 4, 2, batch_first=True), width=4),
    "GRU": lambda: texts(nn.GRU(8, 4, batch_first=True, bidirectional=True)),
    "tied, twice, broadcast": tied,
}  # fmt: skip


def inputs(kind: str, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (samples,), generator=made)
    if kind in IMAGES:
        return torch.randn(samples, 2, 7, 7, generator=made), y
    return torch.randint(11, (samples, 6), generator=made), y


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def assert_clipped(
    model: nn.Module, norms: Tensor, x: Tensor, y: Tensor, limit: float, eps: float = EPS, losses: Any = None
) -> None:
    wanted, total = clipped_gradients(model, [(x, y)], losses or losses_of, limit)
    scale = wanted.clamp(max=limit).sum()
    # Sums of some thousand products, each rounded to eps, of gradients whose lengths add up to the scale.
    assert (norms - wanted).abs().max() <= 500 * eps * wanted.max()
    for p, t in zip(trained(model), total, strict=True):
        assert p.grad is not None
        assert (p.grad.to_dense().double() - t).norm() <= 500 * eps * scale


def clip(model: nn.Module, limits: Any, x: Tensor, y: Tensor) -> Tensor:
    with fastgrad.clip_gradients(model, limits) as clipped:
        return clipped.backward(losses_of(model, x, y))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*IMAGES, *TEXTS]),
    samples=st.integers(1, 5),
    limit=st.sampled_from([1e-3, 0.5, 2.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_a_loop(kind: str, samples: int, limit: float, dtype: torch.dtype, seed: int) -> None:
    """In bfloat16 by autocast, where every activation and gradient is rounded, through three layers."""
    torch.manual_seed(seed)
    cast = dtype == torch.bfloat16
    kind = "group norm" if cast else kind
    model, (x, y) = (IMAGES | TEXTS)[kind]().to(torch.float32 if cast else dtype), inputs(kind, samples, seed)
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    with fastgrad.clip_gradients(model, limit) as clipped:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            logits = model(x)
        logits = logits.float() if cast else logits
        norms = clipped.backward(F.cross_entropy(logits, y, reduction="none"))
    assert norms.dtype == (torch.float32 if cast else dtype)
    assert_clipped(model, norms, x, y, limit, torch.finfo(dtype).eps * (8 / 500 if cast else 1))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def scaled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Losses that are scaled up, as for half precision."""
    return 2.0**12 * losses_of(model, x, y)


def of_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over the tokens that count, of which each sample has another number."""
    labels = (x + y[:, None]) % CLASSES
    labels[:, 1:][x[:, 1:] < 4] = -100
    return F.cross_entropy(model(x).mT, labels, reduction="none").sum(1) / (labels != -100).sum(1)


def tagging() -> Net:
    return Net(lambda net, x: net.head(net.tokens(x)), tokens=nn.Embedding(11, 8), head=nn.Linear(8, CLASSES))


@pytest.mark.parametrize(
    ("make", "losses", "limit"),
    [(TEXTS["layer norm"], losses_of, 1.0), (TEXTS["layer norm"], scaled, 2.0**12), (tagging, of_tokens, 0.5)],
)
def test_micro_batches_and_an_empty_one_accumulate(make: Any, losses: Any, limit: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = make(), inputs("linear", 6, 0)
    with fastgrad.clip_gradients(model, limit) as clipped:
        norms = torch.cat([clipped.backward(losses(model, x[i : i + 2], y[i : i + 2])) for i in (0, 2, 4)])
        assert clipped.backward(losses(model, x[:0], y[:0])).shape == (0,)
    assert_clipped(model, norms, x, y, limit, losses=losses)


def test_groups_are_clipped_on_their_own() -> None:
    torch.manual_seed(0)
    model = TEXTS["layer norm"]()
    x, y = inputs("layer norm", 5, 0)
    limits = {"tokens": 0.1, "layer": 0.2, "layer.1": 0.05, "head.weight": 1.0, "head.bias": 0.3}
    norms = clip(model, limits, x, y)
    assert norms.shape == (5, 5)
    owners = {name: max((k for k in limits if name == k or name.startswith(k + ".")), key=len)
              for name, _ in model.named_parameters()}  # fmt: skip
    for column, (group, limit) in enumerate(limits.items()):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        for name, p in alone.named_parameters():
            p.requires_grad_(owners[name] == group)
            p.grad = model.get_parameter(name).grad if p.requires_grad else None
        assert_clipped(alone, norms[:, column], x, y, limit)


def checkpointed(reentrant: bool, **options: Any) -> Net:
    parts = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), attended())
    return texts(Net(lambda net, x: checkpoint(net.parts, x, use_reentrant=reentrant, **options), parts=parts))


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    x, y = inputs("linear", 4, 0)
    model = checkpointed(False)
    assert_clipped(model, clip(model, 0.3, x, y), x, y, 0.3)
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    selective = checkpointed(False, context_fn=kept)
    plain = copy.deepcopy(selective)
    plain.layer.function = lambda net, x: net.parts(x)
    truth = loss_norms(losses_of(plain, x, y), plain)
    with fastgrad.record(selective):
        found = fastgrad.grad_sqnorm(losses_of(selective, x, y).sum(), list(selective.parameters()))
    torch.testing.assert_close(torch.stack(found, 1).double(), truth, rtol=1e-3, atol=1e-6)
    with pytest.raises(RuntimeError, match="backward an extra time"):  # it bears one, and clipping needs several
        clip(selective, 0.3, x, y)
    reentrant = checkpointed(True)
    with fastgrad.record(reentrant):
        loss = reentrant(x).sum()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):  # PyTorch's own words
            fastgrad.grad_sqnorm(loss, list(reentrant.parameters()))


def test_data_parallel_on_one_device() -> None:
    torch.manual_seed(0)
    model, (x, y) = IMAGES["convolution"](), inputs("convolution", 4, 0)
    wrapper = nn.DataParallel(model)
    assert_clipped(model, clip(wrapper, 0.3, x, y), x, y, 0.3)
    wrapper.device_ids = [0, 1]
    with pytest.raises(ValueError, match="model must not be replicated"):
        fastgrad.record(wrapper)


def _rank(rank: int, file: str, out: str, limits: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, (x, y) = IMAGES["group norm"](), inputs("group norm", 6, 0)
    wrapper = nn.parallel.DistributedDataParallel(model)
    mine = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        model.zero_grad()
        norms = clip(wrapper, limits, x[mine], y[mine])
    torch.save((norms, [p.grad for p in model.parameters()]), f"{out}{rank}")
    # Both leave together and at once: gloo's threads abort one process in twenty that takes its leave, whatever it ran.
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("limits", [pytest.param(0.5, marks=pytest.mark.slow), {"": 0.5, "5": 1e9}])
def test_distributed_data_parallel_averages_the_clipped_sums(tmp_path: Path, limits: Any) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "file"), str(tmp_path / "out"), limits), nprocs=2)
    (norms, grads), (others, same) = (torch.load(tmp_path / f"out{rank}") for rank in (0, 1))
    assert all(map(torch.equal, grads, same))
    torch.manual_seed(0)
    model, (x, y) = IMAGES["group norm"](), inputs("group norm", 6, 0)
    if isinstance(limits, dict):
        model[5].requires_grad_(False)
        norms, others = norms[:, 0], others[:, 0]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = 2 * g if p.requires_grad else None
    assert_clipped(model, torch.cat([norms, others]), x, y, 0.5)


def test_distributed_data_parallel_of_a_static_graph_is_refused() -> None:
    # Without the processes that its own constructor asks for.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module, wrapper.static_graph = nn.Linear(3, 2), True
    with pytest.raises(ValueError, match="static_graph=True: it averages in the first"):
        fastgrad.clip_gradients(wrapper, 1.0)


# Dynamo looks at .grad of all that it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_training_step() -> None:
    torch.manual_seed(0)
    model, (x, y) = IMAGES["convolution"](), inputs("convolution", 4, 0)

    @torch.compile(backend="eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        return clip(model, 0.3, x, y)

    assert_clipped(model, step(x, y), x, y, 0.3)
    torch.compiler.reset()


#: Losses of the image model, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "number": (lambda _, losses: losses.mean(), r"losses must have shape \(4,\) .*it was \(\)"),
    "order": (lambda _, losses: losses.flip(0), "losses must each depend on their own sample"),
    "mean": (lambda _, losses: losses + 1e-3 * losses.mean(), "losses must each depend on their own sample"),
    "detached": (lambda _, losses: torch.ones(4, requires_grad=True) * losses.detach(),
        "losses must be computed from"),
    "integers": (lambda _, losses: losses.long(), "losses must have a floating dtype"),
    "decay": (lambda model, losses: losses + model[0].weight.square().sum(), "reach '0.weight' in another way"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_losses_that_are_refused(way: str) -> None:
    spoil, message = REFUSED[way]
    model, (x, y) = IMAGES["convolution"](), inputs("convolution", 4, 0)
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        losses = losses_of(model, x, y)
        with pytest.raises((ValueError, TypeError), match=message):
            clipped.backward(spoil(model, losses))
        assert all(p.grad is None for p in model.parameters())
        hook = model[0].bias.register_hook(lambda gradient: 3 * gradient)
        with pytest.raises(ValueError, match=r"must have no hooks on its parameters .*'0.bias' had one"):
            clipped.backward(losses)
        hook.remove()
        assert clipped.backward(losses).shape == (4,)
        losses = losses_of(model, x, y) + losses_of(model, x, y)
        with pytest.raises(RuntimeError, match="called 2 times"):
            clipped.backward(losses)
    with pytest.raises(RuntimeError, match="called 0 times"):
        clipped.backward(losses)


def test_losses_of_outputs_without_the_batch_are_refused() -> None:
    model = Net(lambda net, x: (net.head(x), x.mean()), head=nn.Linear(4, 3))
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        logits, mean = model(torch.randn(5, 4, requires_grad=True))
        with pytest.raises(ValueError, match="losses must be computed from outputs that carry the batch"):
            clipped.backward(logits.square().sum(1) + mean)


def test_what_is_trained_may_change_between_steps() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    clipped = fastgrad.clip_gradients(model, 1e-3)
    for change in (lambda: model[0].requires_grad_(False), lambda: model.requires_grad_(True)):
        change()
        model.zero_grad()
        truth = loss_norms(model(x).square().sum(1), model).sum(1).sqrt()
        with clipped:
            norms = clipped.backward(model(x).square().sum(1))
        torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["full_backward", "forward"])
def test_a_hook_that_clamps_is_refused_where_it_came_later(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)

    def clamp(_: nn.Module, given: Any, output: Any) -> Any:
        if kind == "forward":
            output.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
            return None
        return tuple(g.clamp(-1e-2, 1e-2) for g in given)

    place = 0 if kind == "forward" else 2
    watching = getattr(model[place], f"register_{kind}_hook")(lambda *_: None)
    with fastgrad.clip_gradients(model, 1e-3) as clipped:
        clipped.backward(model(x).square().sum(1))
        watching.remove()
        getattr(model[place], f"register_{kind}_hook")(clamp)
        with pytest.raises(ValueError, match="in proportion to its losses"):
            clipped.backward(model(x).square().sum(1))


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [(torch, "tanh"), (torch.autograd, "backward")])
def test_a_step_that_fails_leaves_the_next_one_as_it_was(
    monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], place: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure("once")

    torch.manual_seed(0)
    inner, head = nn.Linear(4, 4), nn.Linear(4, 1)
    # Modules in a closure, as the blocks of minGPT have them.
    model, x = Net(lambda net, x: head(torch.tanh(inner(x))).flatten(), inner=inner, head=head), torch.randn(6, 4)
    with fastgrad.clip_gradients(model, 0.5) as clipped:
        truth = clipped.backward(model(x))
        with monkeypatch.context() as patched:
            patched.setattr(*place, fail)
            with pytest.raises(failure, match="once"):
                clipped.backward(model(x))
        assert torch.equal(clipped.backward(model(x)), truth)


#: Layers whose numbers in training mode are random, or that write to buffers then.
TRAINED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: texts(attended(0.5)),
    "LSTM": lambda: texts(nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)),
    "encoder": lambda: texts(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)),
    "dropouts": lambda: texts(nn.Sequential(nn.AlphaDropout(0.5), nn.Dropout1d(0.5), nn.PReLU(), nn.Linear(8, 8))),
    "spectral norm": lambda: texts(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
    "instance norm": lambda: image_model(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, 1e-3, 0.1, True, True)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED)
def test_training_mode(kind: str) -> None:
    """Norms are those of the gradients that the same graph gives, and buffers are those of an ordinary call."""
    torch.manual_seed(0)
    model, (x, y) = TRAINED[kind](), inputs("convolution" if kind == "instance norm" else "linear", 4, 0)
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    plain(x)
    with fastgrad.record(model):
        losses = losses_of(model, x, y)
        found = torch.stack(fastgrad.grad_sqnorm(losses.sum(), parameters, retain_graph=True), 1)
        for loss, norms in zip(losses, found, strict=True):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            truth = torch.stack([g.square().sum() for g in grads])
            torch.testing.assert_close(norms, truth, rtol=1e-3, atol=1e-5 * float(truth.max()))
    for buffer, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
