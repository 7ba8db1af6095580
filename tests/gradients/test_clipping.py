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
from small_nets import SMALL, Clamped, Net, build, sequence, waves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastgrad


def assert_clipped(
    model: nn.Module, norms: Tensor, x: Tensor, limit: float, eps: float = 2**-23, losses: Any = waves,
    cast: bool = False,
) -> None:  # fmt: skip
    wanted, total = clipped_gradients(model, x, losses, limit, cast=cast)
    scale = wanted.clamp(max=limit).sum()
    # Sums of some thousand products, each rounded to eps, of gradients whose lengths add up to the scale; in
    # bfloat16 every sum is float32's, and its result and the gradient that it came from are rounded once each.
    budget = 2 * torch.finfo(torch.bfloat16).eps if cast else 500 * eps
    assert (norms - wanted).abs().max() <= budget * wanted.max()
    for p, t in zip((p for p in model.parameters() if p.requires_grad), total, strict=True):
        # A parameter of a path that no sample took has none.
        assert p.grad is not None or not t.any()
        assert p.grad is None or (p.grad.to_dense().double() - t).norm() <= budget * scale


def clip(model: nn.Module, limits: Any, x: Tensor) -> Tensor:
    with fastgrad.clip_gradients(model, limits) as clipped:
        return clipped.backward(waves(model(x)))


def of_one_class(out: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(out, out.new_zeros(len(out), dtype=torch.long), reduction="none")


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*SMALL]),
    samples=st.integers(1, 5),
    limit=st.sampled_from([1e-3, 0.5, 2.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_a_loop(
    kind: str, samples: int, limit: float, dtype: torch.dtype, frozen: bool, seed: int
) -> None:
    """In bfloat16 by autocast, those of a loop in bfloat16."""
    cast = dtype == torch.bfloat16
    model, x = build("group norm" if cast else kind, samples, seed)
    next(model.parameters()).requires_grad_(not frozen)
    if dtype == torch.float64:
        model, x = model.double(), x.double() if x.is_floating_point() else x
    losses = of_one_class if cast else waves
    with fastgrad.clip_gradients(model, limit) as clipped:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(x)
        norms = clipped.backward(losses(out.float() if cast else out))
    assert norms.dtype == (torch.float32 if cast else dtype)
    assert_clipped(model, norms, x, limit, torch.finfo(dtype).eps, losses, cast)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def of_tokens(out: Tensor, x: Tensor) -> Tensor:
    """The mean over the tokens that count, of which each sample has another number."""
    labels = x % out.shape[2]
    labels[:, 1:][x[:, 1:] < 4] = -100
    return F.cross_entropy(out.mT, labels, reduction="none").sum(1) / (labels != -100).sum(1)


#: Losses, and limits; some are scaled up, as for half precision.
LOSSES = [(waves, 1.0), (lambda out, _: 2.0**12 * waves(out), 2.0**12), (of_tokens, 0.5)]


@pytest.mark.parametrize(("losses", "limit"), LOSSES)
def test_micro_batches_and_an_empty_one_accumulate(losses: Any, limit: float) -> None:
    model, x = build("layer norm", 6)
    with fastgrad.clip_gradients(model, limit) as clipped:
        norms = torch.cat([clipped.backward(losses(model(part), part)) for part in x.split(2)])
        assert clipped.backward(losses(model(x[:0]), x[:0])).shape == (0,)
    assert_clipped(model, norms, x, limit, losses=losses)


def test_groups_are_clipped_on_their_own() -> None:
    model, x = build("layer norm")
    model = nn.Sequential(model, nn.Linear(8, 3))
    limits = {"0": 0.1, "0.1": 0.2, "0.1.bias": 0.05, "1.weight": 1.0, "1.bias": 0.3}
    norms = clip(model, limits, x)
    assert norms.shape == (5, 5)
    owners = {name: max((k for k in limits if name == k or name.startswith(k + ".")), key=len)
              for name, _ in model.named_parameters()}  # fmt: skip
    for column, (group, limit) in enumerate(limits.items()):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        for name, p in alone.named_parameters():
            p.requires_grad_(owners[name] == group)
            p.grad = model.get_parameter(name).grad if p.requires_grad else None
        assert_clipped(alone, norms[:, column], x, limit)


def checkpointed(reentrant: bool, **options: Any) -> Net:
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True))
    return Net(lambda net, x: net.head(checkpoint(net.body, net.table(x), use_reentrant=reentrant, **options)),
               table=nn.Embedding(11, 8), body=body, head=nn.Linear(8, 3))  # fmt: skip


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    model, x = checkpointed(False), torch.randint(11, (4, 6))
    assert_clipped(model, clip(model, 0.3, x), x, 0.3)
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    selective = checkpointed(False, context_fn=kept)
    plain = copy.deepcopy(selective)
    plain.function = lambda net, x: net.head(net.body(net.table(x)))
    with fastgrad.record(selective):
        found = fastgrad.grad_sqnorm(waves(selective(x)).sum(), list(selective.parameters()))
    torch.testing.assert_close(torch.stack(found, 1).double(), loss_norms(waves(plain(x)), plain), rtol=1e-3, atol=1e-6)
    with pytest.raises(RuntimeError, match="backward an extra time"):  # it bears one, and clipping needs several
        clip(selective, 0.3, x)
    reentrant = checkpointed(True)
    with fastgrad.record(reentrant), pytest.raises(ValueError, match="use use_reentrant=False"):
        reentrant(x)


def test_frozen_parameter_beside_a_checkpoint() -> None:
    torch.manual_seed(0)
    model, x = checkpointed(False), torch.randint(11, (4, 6))
    model.head.register_full_backward_hook(lambda *_: None)  # so that samples run alone

    def norms() -> tuple[torch.Tensor, ...]:
        with fastgrad.record(model):
            return fastgrad.grad_sqnorm(waves(model(x)).sum(), list(model.parameters()))

    norms()
    model.table.requires_grad_(False)
    with pytest.raises(ValueError, match="params must require gradients where samples run alone because of a checkpo"):
        norms()


def test_data_parallel_on_one_device() -> None:
    model, x = build("conv")
    wrapper = nn.DataParallel(model)
    assert_clipped(model, clip(wrapper, 0.3, x), x, 0.3)
    wrapper.device_ids = [0, 1]
    with pytest.raises(ValueError, match="model must not be replicated"):
        fastgrad.record(wrapper)


def _rank(rank: int, file: str, out: str, limits: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, x = build("group norm", 6)
    wrapper = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        norms = clip(wrapper, limits, x.chunk(2)[rank])
    torch.save((norms, [p.grad for p in model.parameters()]), f"{out}{rank}")
    # Both leave together and at once: gloo's threads abort one process in twenty that takes its leave, whatever it ran.
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("limits", [pytest.param(0.5, marks=pytest.mark.slow), {"": 0.5, "4": 1e9}])
def test_distributed_data_parallel_averages_the_clipped_sums(tmp_path: Path, limits: Any) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "file"), str(tmp_path / "out"), limits), nprocs=2)
    (norms, grads), (others, same) = (torch.load(tmp_path / f"out{rank}") for rank in (0, 1))
    assert all(map(torch.equal, grads, same))
    model, x = build("group norm", 6)
    if isinstance(limits, dict):
        model[4].requires_grad_(False)
        norms, others = norms[:, 0], others[:, 0]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = 2 * g if p.requires_grad else None
    assert_clipped(model, torch.cat([norms, others]), x, 0.5)


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
    model, x = build("conv")
    norms = torch.compile(lambda x: clip(model, 0.3, x), backend="eager")(x)
    assert_clipped(model, norms, x, 0.3)
    torch.compiler.reset()


#: Losses of a model of images, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "number": (lambda _, losses: losses.mean(), r"losses must have shape \(5,\) .*it was \(\)"),
    "order": (lambda _, losses: losses.flip(0), "losses must each depend on their own sample"),
    "mean": (lambda _, losses: losses + 1e-3 * losses.mean(), "losses must each depend on their own sample"),
    "detached": (lambda _, losses: torch.ones(5, requires_grad=True) * losses.detach(),
        "losses must be computed from"),
    "integers": (lambda _, losses: losses.long(), "losses must have a floating dtype"),
    "decay": (lambda model, losses: losses + model[0].weight.square().sum(), "reach '0.weight' in another way"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_losses_that_are_refused(way: str) -> None:
    spoil, message = REFUSED[way]
    model, x = build("conv")
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        losses = waves(model(x))
        with pytest.raises((ValueError, TypeError), match=message):
            clipped.backward(spoil(model, losses))
        assert all(p.grad is None for p in model.parameters())
        hook = model[0].bias.register_hook(lambda gradient: 3 * gradient)
        with pytest.raises(ValueError, match=r"must have no hooks on its parameters .*'0.bias' had one"):
            clipped.backward(losses)
        hook.remove()
        assert clipped.backward(losses).shape == (5,)
        losses = waves(model(x)) + waves(model(x))
        with pytest.raises(RuntimeError, match="called 2 times"):
            clipped.backward(losses)
    with pytest.raises(RuntimeError, match="called 0 times"):
        clipped.backward(losses)


def test_losses_of_outputs_that_all_samples_share_are_refused() -> None:
    model = Net(
        lambda net, x: (net.head(x), net.shared), head=nn.Linear(4, 3), shared=torch.ones(2, requires_grad=True)
    )
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        logits, shared = model(torch.randn(5, 4))
        with pytest.raises(ValueError, match=r"losses must be computed from outputs that carry the batch; .* \(2,\)"):
            clipped.backward(logits.square().sum(1) + shared.square().sum())


def test_what_is_trained_may_change_between_steps() -> None:
    model, x = build("linear")
    clipped = fastgrad.clip_gradients(model, 1e-3)
    for change in (lambda: model[0].requires_grad_(False), lambda: model.requires_grad_(True)):
        change()
        model.zero_grad()
        with clipped:
            norms = clipped.backward(waves(model(x)))
        assert_clipped(model, norms, x, 1e-3)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["full_backward", "forward"])
@pytest.mark.parametrize("later", [True, False])
def test_a_hook_that_clamps_is_refused(kind: str, later: bool) -> None:
    def clamp(_: nn.Module, given: Any, output: Any) -> Any:
        if kind == "forward":
            output.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
            return None
        return tuple(g.clamp(-1e-2, 1e-2) for g in given)

    model, x = build("linear")
    register = getattr(model[0 if kind == "forward" else 2], f"register_{kind}_hook")
    with fastgrad.clip_gradients(model, 1e-3) as clipped:
        if later:
            watching = register(lambda *_: None)
            clipped.backward(waves(model(x)))
            watching.remove()
        register(clamp)
        with pytest.raises(ValueError, match="model must have gradients in proportion to its losses"):
            clipped.backward(waves(model(x)))


def test_a_function_that_clamps_is_refused() -> None:
    model = Net(lambda net, x: net.head(Clamped.apply(net.layer(x))), layer=nn.Linear(6, 5), head=nn.Linear(5, 3))
    with (
        fastgrad.clip_gradients(model, 1e-3) as clipped,
        pytest.raises(ValueError, match="model must have gradients in proportion to its losses"),
    ):
        clipped.backward(waves(model(torch.randn(5, 6))))


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [(torch, "tanh"), (torch.autograd, "backward")])
def test_failed_step_changes_no_other(
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


def forked(net: Any, x: Tensor) -> Tensor:
    """Draws a number for each sample, and drops features of those that begin with a positive number."""
    h = net.inner(x * torch.rand(len(x), 1, 1) if net.training else x)
    return F.dropout(h, 0.5, net.training) if x[0, 0, 0] > 0 else h


#: Layers whose numbers in training mode are random, or that write to buffers then; and shapes of their inputs.
TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: Net(lambda net, x: net.inner(x, x, x, need_weights=False)[0],
        inner=nn.MultiheadAttention(8, 2, 0.5, batch_first=True)), (6, 8)),
    "LSTM": (lambda: sequence(nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)), (6, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), (6, 8)),
    "dropouts": (lambda: nn.Sequential(
        nn.Linear(8, 8), nn.AlphaDropout(0.5), nn.Dropout1d(0.5), nn.PReLU(), nn.Linear(8, 8)), (6, 8)),
    "two paths": (lambda: Net(forked, inner=nn.Linear(8, 8)), (6, 8)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), (6, 8)),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, 1e-3, 0.1, True, True)), (2, 7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED)
def test_training_mode(kind: str) -> None:
    """Norms are those of the gradients that the same graph gives, and buffers are those of an ordinary call."""
    torch.manual_seed(0)
    make, shape = TRAINED[kind]
    model, x = make(), torch.randn(4, *shape)
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    plain(x)
    with fastgrad.record(model):
        losses = waves(model(x))
        found = torch.stack(fastgrad.grad_sqnorm(losses.sum(), parameters, retain_graph=True), 1)
        truth = loss_norms(losses, model)
    assert ((found - truth).abs() <= 1e-3 * truth + 1e-5 * truth.amax(1, keepdim=True)).all()
    for buffer, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_empty_batch_of_frozen_parameters() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        assert clipped.backward(model(torch.randn(0, 3)).sum(1)).shape == (0,)


def test_an_empty_batch_of_sequences_adds_zeros() -> None:
    """PyTorch's own backward pass of a recurrent layer leaves NaN there."""
    net = Net(
        lambda own, x: own.head(own.layer(x)[0].mean(1)), layer=nn.RNN(3, 4, batch_first=True), head=nn.Linear(4, 2)
    )
    with fastgrad.clip_gradients(net, 1.0) as clipped:
        for rows in (0, 2, 0):
            norms = clipped.backward(net(torch.randn(rows, 5, 3)).sum(1))
            assert len(norms) == rows
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_plain_backward_inside_is_an_error_at_the_end() -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)

    def inside(do: Callable[[Tensor], Any]) -> None:
        with fastgrad.clip_gradients(net, 1.0):
            do(net(x))

    with pytest.raises(RuntimeError, match="a plain backward clips nothing"):
        inside(lambda out: out.sum().backward())
    with pytest.raises(ZeroDivisionError):
        inside(lambda _: 1 // 0)
    with fastgrad.clip_gradients(net, 1.0) as clipped:
        clipped.backward(net(x).sum(1))
        with torch.no_grad():
            net(x)
