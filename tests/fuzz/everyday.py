"""Everyday training behind ``record``, a row each: what changes between calls, and what a loop over samples gives."""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, relative_error
from small_nets import Clamped, Net, inputs, parts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad
from tests.fuzz.scripts import scripted

X, Y = inputs(4, 3), torch.tensor([0, 1, 1, 0])
SEQUENCE = inputs(4, 5, 3)


def of_samples(model: nn.Module, losses: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """``(B, P)``: norms of each sample alone, of a copy with the same parameters."""
    own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    rows = zip(*(x.split(1) for x in batch), strict=True)
    return loss_norms((losses(own, *row).sum() + 0 * sum(p.sum() for p in model.parameters()) for row in rows), model)


def same(model: nn.Module, losses: Callable[..., Tensor], *batch: Tensor) -> None:
    """Norms and clipped norms of a batch are those of its samples, and clipping holds its bound."""
    truth = of_samples(model, losses, *batch)
    kept = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with fastgrad.record(model):
        found = torch.stack(fastgrad.grad_sqnorm(losses(model, *batch), model), 1)
    assert found.shape == truth.shape
    assert relative_error(found, truth, 2e-16).max() < 1e-9
    model.zero_grad()
    limit = 1e-3
    with fastgrad.clip_gradients(kept, limit) as clipped:
        norms = clipped.backward(losses(kept, *batch))
    torch.testing.assert_close(norms, truth.sum(1).sqrt(), rtol=1e-9, atol=1e-14)
    total = sum(float(p.grad.square().sum()) for p in kept.parameters() if p.grad is not None) ** 0.5
    assert total <= len(truth) * limit * (1 + 1e-9)
    model.zero_grad()


def own(model: nn.Module, *batch: Tensor) -> Tensor:
    """Losses that the model computes itself."""
    return model(*batch)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().sum(1)


# Losses inside of the model.


def text(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "BERT":
        made = transformers.BertForSequenceClassification(
            transformers.BertConfig(**size, intermediate_size=8, num_labels=3, max_position_embeddings=16)  # type: ignore[call-arg]
        )
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, use_cache=False)
        )
    return made.double().eval()


def of_text(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=labels).loss


def bert() -> None:
    model, tokens = text("BERT"), torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    same(model, of_text, torch.ones_like(tokens), torch.ones(4, dtype=torch.long))
    same(model, of_text, tokens, torch.tensor([0, 2, 1, 1]))


def gpt2() -> None:
    model, tokens = text("GPT-2"), torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    same(model, of_text, tokens, tokens)
    padded = torch.where(torch.arange(6) < torch.tensor([6, 4, 5, 3])[:, None], tokens, -100)
    same(model, of_text, tokens, padded)


def with_loss(loss: Callable[[Any, Tensor, Tensor], Tensor], **more: Any) -> Net:
    return parts(lambda net, x, y: loss(net, net.head(net.layer(x).tanh()), y), **more)


def zero_head(later: bool) -> None:
    model = with_loss(lambda net, z, y: F.cross_entropy(z, y))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    same(model, own, X, Y)
    if later:
        nn.init.normal_(model.head.weight)
        same(model, own, X, Y)


def begins_at_zero(loss: Callable[[Any, Tensor, Tensor], Tensor], **changes: Any) -> None:
    model = with_loss(loss, **dict.fromkeys(changes, 0.0))
    same(model, own, X, Y)
    vars(model).update(changes)
    same(model, own, X, Y)


def hinge() -> None:
    model = with_loss(lambda net, z, y: F.relu(net.margin - z.gather(1, y[:, None])).mean(), margin=-99.0)
    same(model, own, X, Y)
    model.margin = 99.0
    same(model, own, X, Y)


def reductions(by: str) -> None:
    model = parts(lambda net, x, y, how="": F.cross_entropy(net.head(x), y, reduction=how or net.how), how="mean")
    for how in ("mean", "sum", "mean"):
        model.how = how
        call = (lambda m, x, y, how=how: m(x, y, how=how)) if by == "argument" else own
        same(model, call, X, Y)


def integer() -> None:
    model = parts(lambda net, x, n: (net.head(x).square() * n).sum())
    for n in (0, 3, 1):
        same(model, functools.partial(lambda m, x, n: m(x, n), n=n), X)


# Parameters that come with the path.


def by_length(use: Callable[[Any, Tensor], Tensor], **more: Any) -> None:
    model = parts(lambda net, x: net.head(use(net, net.layer(x))).mean(1), **more)
    for length in (5, 4, 5):
        same(model, squares, SEQUENCE[:, :length])


def attention_bias() -> None:
    def use(net: Any, h: Tensor) -> Tensor:
        q = h.unsqueeze(1)
        bias = net.bias[:4, :4] if h.shape[1] == 4 else None
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).squeeze(1)

    by_length(use, bias=nn.Parameter(inputs(5, 5)))


def later_script() -> None:
    by_length(lambda net, h: scripted(h, net.scale) if h.shape[1] == 4 else h)


def later_view() -> None:
    by_length(lambda net, h: h @ net.matrix.view(9).view(3, 3).t() if h.shape[1] == 4 else h)


def later_custom() -> None:
    model = parts(lambda net, x: net.head(Clamped.apply(net.layer(x)) if net.on else net.layer(x)), on=False)
    same(model, squares, X)
    model.on = True
    with fastgrad.clip_gradients(model, 1e-3) as clipped:
        clipped.backward(squares(model, X))


# States, regularisers, statistics.


def carried(*, warm: bool, detach: bool) -> None:
    model = parts(lambda net, x: net.step(x), cell=nn.RNNCell(3, 3), state=None)
    model.step = lambda x: setattr(model, "state", model.cell(x, model.state)) or model.head(model.state)  # type: ignore[func-returns-value]
    plain = [parts(lambda net, x: net.head(net.cell(x, net.state)), cell=model.cell, head=model.head) for _ in X]
    states: list[Any] = [None] * len(X)
    if warm:
        model(X)
        states = [model.cell(row) for row in X.split(1)]
    for seed in range(3):
        x, losses = inputs(4, 3, seed=seed), []
        for i, row in enumerate(x.split(1)):
            states[i] = model.cell(row, states[i].detach() if states[i] is not None and detach else states[i])
            losses.append(model.head(states[i]).square().sum())
        if detach and model.state is not None:
            model.state = model.state.detach()
        names = [(n, p) for n, p in model.named_parameters() if n.split(".")[0] in ("cell", "head")]
        net = nn.ParameterDict({n.replace(".", "_"): p for n, p in names})
        with fastgrad.record(model):
            out = model(x)
            assert model.state.shape == (4, 3)
            found = fastgrad.grad_sqnorm(out.square().sum(1), [p for _, p in names], retain_graph=True)
            if detach:
                truth = loss_norms(losses, net)
                order = list(net.parameters())
                at = [next(i for i, q in enumerate(order) if q is p) for _, p in names]
                assert relative_error(torch.stack(found, 1), truth[:, at], 2e-16).max() < 1e-9
    assert plain


def regulariser() -> None:
    model = parts(lambda net, x: (net.head(x), 0.1 * net.matrix.square().sum()))

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        z, extra = model(x)
        return z.square().sum(1) + extra

    same(model, losses, X)


def statistics() -> None:
    model = parts(lambda net, x: net.head(net.norm(net.layer(x))), norm=nn.BatchNorm1d(3))
    truth = of_samples(model, squares, X)
    with fastgrad.record(model):
        losses = squares(model, X)
        model.norm.running_var.mul_(4)
        found = torch.stack(fastgrad.grad_sqnorm(losses, model), 1)
    assert relative_error(found, truth, 2e-16).max() < 1e-9


def lstm_states() -> None:
    model = parts(lambda net, x: net.lstm(x), lstm=nn.LSTM(3, 3, 2, batch_first=True))

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        out, (h, c) = model(x)
        assert h.shape == c.shape == (2, len(x), 3)
        return out.square().sum((1, 2)) + h.square().sum((0, 2)) + c.sum((0, 2))

    for length in (5, 1, 3):
        same(model, losses, SEQUENCE[:, :length])
    same(model, losses, SEQUENCE[:1])


# What must be refused.


def recorded(model: nn.Module, losses: Callable[[], Any], **options: Any) -> Any:
    with fastgrad.record(model, **options):
        return fastgrad.grad_sqnorm(losses(), model)


def mixing() -> None:
    model = parts(lambda net, x: net.head(x.bfloat16().double() - 0.05 * x.mean(0)))
    recorded(model, lambda: squares(model, X))


def positions(losses: Callable[[Tensor], Tensor]) -> None:
    model = parts(lambda net, x: x, table=nn.Embedding(9, 3))
    x = inputs(5, 5, 3)
    recorded(model, lambda: losses(model.layer(x) + model.table(torch.arange(5))))


def outside() -> None:
    model = parts(lambda net, x: net.head(x))
    recorded(model, lambda: model(X).square().sum() + (X @ model.head.weight.T).square().sum())


def decay() -> None:
    model = parts(lambda net, x: net.head(x))
    recorded(model, lambda: model(X).square().sum() + 0.1 * model.head.weight.square().sum())


def mean_loss(loss: Callable[[Tensor], Tensor]) -> None:
    model = parts(lambda net, x: net.head(x))
    recorded(model, lambda: loss(model(X)))


def generator() -> None:
    model = parts(lambda net, x: (net.head(x) for _ in range(2)))
    recorded(model, lambda: sum(z.square().sum() for z in model(X)))


def reentrant() -> None:
    model = parts(lambda net, x: net.head(checkpoint(net.layer, net.other(x), use_reentrant=True)))
    recorded(model, lambda: squares(model, X))


def differing(what: str) -> None:
    def function(net: Any, x: Tensor) -> Any:
        z, yes = net.head(x), bool(x.sum() > 0)
        if what == "structure":
            return [z] * (1 + yes)
        if what == "number":
            return z, 2.0 if yes else 1.0
        if what == "attribute":
            net.count = int(yes)
            return z
        if what == "buffer":
            net.total.add_(int(yes))
            return z
        return x[:, : 2 + yes] * net.scale[: 2 + yes]

    model = parts(function, total=nn.Buffer(torch.zeros(())))
    recorded(model, lambda: sum(t.square().sum() for t in _floats(model(X))))


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def square_inputs() -> None:
    model = parts(lambda net, x, mask: net.head(x * mask.sum()))
    recorded(model, lambda: squares(lambda x: model(x, torch.ones(4, 4)), X))  # type: ignore[arg-type]


def square_inputs_told() -> None:
    mask = inputs(4, 4)
    shared = parts(lambda net, x, mask: net.head(mask.tril() @ x).mean(1))
    with fastgrad.record(shared, batch_dims={1: None}):
        found = torch.stack(fastgrad.grad_sqnorm(shared(SEQUENCE[:, :4], mask).square().sum(1), shared), 1)
    truth = of_samples(shared, lambda m, x: m(x, mask).square().sum(1), SEQUENCE[:, :4])
    assert relative_error(found, truth, 2e-16).max() < 1e-9
    rows = parts(lambda net, x, mask: net.head(x * mask.sum(1, keepdim=True)))
    with fastgrad.record(rows, batch_dims=0):
        found = torch.stack(fastgrad.grad_sqnorm(rows(X, mask).square().sum(1), rows), 1)
    truth = of_samples(rows, lambda m, x, w: m(x, w).square().sum(1), X, mask)
    assert relative_error(found, truth, 2e-16).max() < 1e-9


def batch_in_another_dimension() -> None:
    model = parts(lambda net, x, h: net.rnn(x, h)[0][-1], rnn=nn.RNN(3, 3))
    h = inputs(1, 4, 3, seed=3)
    with fastgrad.record(model, batch_dims={0: 1, 1: 1}):
        found = torch.stack(fastgrad.grad_sqnorm(model(SEQUENCE.transpose(0, 1), h).square().sum(1), model), 1)
    truth = of_samples(
        model, lambda m, x, h: m(x.transpose(0, 1), h.transpose(0, 1)).square().sum(1), SEQUENCE, h.transpose(0, 1)
    )
    assert relative_error(found, truth, 2e-16).max() < 1e-9


def creating() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        if net.late is None:
            net.late = nn.Linear(3, 2, dtype=x.dtype)
        return net.late(x)

    model = parts(function, late=None)
    recorded(model, lambda: squares(model, X))


# Transforms and functions inside.


def transformed(kind: str) -> None:
    def energy(net: Any, x: Tensor) -> Tensor:
        return net.layer(x).tanh().sum()

    def in_place(row: Tensor) -> Tensor:
        return row.clone().mul_(2).tanh()

    ways: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "grad": lambda net, x: net.head(torch.func.grad(lambda x: energy(net, x))(x)),
        "jacobian": lambda net, x: net.head(
            torch.func.vmap(torch.func.jacrev(lambda x: net.layer(x).tanh()))(x).sum(2)
        ),
        "in place": lambda net, x: net.head(torch.func.vmap(in_place)(net.layer(x))),
    }
    same(parts(ways[kind]), squares, X)


def by_keyword() -> None:
    same(parts(lambda net, x: torch.mm(net.layer(x), mat2=net.matrix)), squares, X)


def losses_of_samples() -> None:
    model = parts(lambda net, x: net.head(x))
    with fastgrad.record(model):
        losses = squares(model, X)
        one = torch.stack(fastgrad.grad_sqnorm(losses, model, retain_graph=True), 1)
        gram = fastgrad.grad_gram(losses, model, retain_graph=True)
        sums = fastgrad.grad_square_sum(losses, model.head)
    torch.testing.assert_close(gram.diagonal(), one.sum(1))
    torch.testing.assert_close(torch.stack([s.sum() for s in sums]), one[:, -2:].sum(0))


# Threads and the process.


def threads() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        net.last = h = net.layer(x)
        return net.head(h)

    model = parts(function, last=None)
    batches = [inputs(n, 3, seed=n) for n in (4, 2, 5)]
    truths = [of_samples(model, squares, x) for x in batches]
    failed: list[BaseException] = []

    def work(features: bool) -> None:
        try:
            extractor = fastgrad.GradientFeatures(model, loss="mse", target=torch.zeros_like)
            for _ in range(5):
                for x, truth in zip(batches, truths, strict=True):
                    if features:
                        found = extractor(x)[1]
                    else:
                        with fastgrad.record(model):
                            found = torch.stack(fastgrad.grad_sqnorm(squares(model, x), model), 1)
                    assert relative_error(found, truth, 2e-16).max() < 1e-9
        except BaseException as error:
            failed.append(error)

    started = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(3)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if failed:
        raise failed[0]
    assert "forward" not in vars(model)
    assert model.last is None or not torch._C._functorch.is_functorch_wrapped_tensor(model.last)


def compiled_after_threads() -> None:
    model = parts(lambda net, x: net.head(net.layer(x)))
    runs = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append(1)
        return graph.forward

    def work() -> None:
        for _ in range(5):
            recorded(model, lambda: squares(model, X))

    import torch._dynamo

    started = [threading.Thread(target=work) for _ in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    torch.compile(model, backend=backend)(X)
    torch._dynamo.reset()
    assert runs


def compiled_parts(how: str) -> None:
    runs = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append(1)
        return graph.forward

    model = parts(
        lambda net, x: net.head(net.block(x)), block=Net(lambda net, x: net.linear(x).tanh(), linear=nn.Linear(3, 3))
    )
    if how == "in place":
        model.block.compile(backend=backend)
    else:
        model.block = torch.compile(model.block, backend=backend)
    block = model.block if how == "in place" else model.block._orig_mod
    plain = parts(lambda net, x: net.head(net.block(x)), block=block, head=model.head)
    truth = of_samples(plain, squares, X)
    runs.clear()
    for _ in range(2):
        found = torch.stack(recorded(model, lambda: squares(model, X)), 1)
        used = [i for i, (n, _) in enumerate(model.named_parameters()) if n.startswith(("block", "head"))]
        wanted = [i for i, (n, _) in enumerate(plain.named_parameters()) if n.startswith(("block", "head"))]
        names = [n.replace("_orig_mod.", "") for n, _ in model.named_parameters()]
        order = [names.index(n) for n, _ in plain.named_parameters()]
        assert relative_error(found[:, order][:, wanted], truth[:, wanted], 2e-16).max() < 1e-9
        assert used
    assert not runs
    torch._dynamo.reset()
    model(X)
    assert runs
    torch._dynamo.reset()


def draws_of_another_thread() -> None:
    model = parts(lambda net, x: (event.set(), done.wait(10))[1] and net.head(x))
    event, done = threading.Event(), threading.Event()
    drawn: list[Tensor] = []

    def work() -> None:
        event.wait(10)
        drawn.append(torch.rand(3))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    fastgrad.GradientFeatures(model)(X)
    thread.join()
    assert not torch.equal(drawn[0], torch.rand(3))
    assert drawn


class Word:
    """An entry that must not be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")

    __copy__ = __deepcopy__


def large_dictionary() -> None:
    model = parts(lambda net, x: net.head(x), words={i: Word() for i in range(300_000)})
    fastgrad.GradientFeatures(model)(X)
    recorded(model, lambda: squares(model, X))


# More of everyday training.


def tied_heads() -> None:
    model = parts(lambda net, x: (net.head(x), net.head(net.layer(x))))
    same(model, lambda m, x: sum(z.square().sum(1) for z in m(x)), X)


def unfrozen_between() -> None:
    model = parts(lambda net, x: net.head(net.layer(x).tanh()))
    for frozen in (True, False, True):
        model.layer.requires_grad_(not frozen)
        truth = of_samples(model.requires_grad_(True), squares, X)
        model.layer.requires_grad_(not frozen)
        found = torch.stack(recorded(model, lambda: squares(model, X)), 1)
        assert relative_error(found, truth, 2e-16).max() < 1e-9
    model.requires_grad_(True)


def last_batch_smaller() -> None:
    model = with_loss(lambda net, z, y: F.cross_entropy(z, y))
    for rows in (4, 1, 3, 4):
        same(model, own, X[:rows], Y[:rows])


def multi_task() -> None:
    """Several losses in a dictionary, some of them zero at first."""
    model = parts(
        lambda net, x, y: {"a": F.cross_entropy(net.head(x), y), "b": net.weight * net.layer(x).square().mean()},
        weight=0.0,
    )
    for weight in (0.0, 0.5):
        model.weight = weight
        same(model, lambda m, x, y: sum(m(x, y).values()), X, Y)


def loss_of_mask() -> None:
    """A loss over what a mask leaves, which is nothing for some samples."""

    def loss(net: Any, z: Tensor, y: Tensor) -> Tensor:
        kept = (y != 0).to(z.dtype)
        return (F.cross_entropy(z, y, reduction="none") * kept).sum() / kept.sum().clamp(min=1)

    model = with_loss(loss)
    same(model, own, X, torch.zeros_like(Y))
    same(model, own, X, Y)


def contrastive_temperature() -> None:
    model = parts(lambda net, x: F.normalize(net.head(x), dim=1) * net.logit.exp(), logit=nn.Parameter(torch.zeros(())))
    same(model, squares, X)
    model.logit.data.fill_(2.0)
    same(model, squares, X)


def gradient_scale() -> None:
    model = with_loss(lambda net, z, y: 1024 * F.cross_entropy(z, y))
    same(model, own, X, Y)


def dropout_training() -> None:
    model = parts(lambda net, x, y: F.cross_entropy(net.head(F.dropout(net.layer(x), 0.5, net.training)), y)).train()
    for _ in range(2):
        with fastgrad.record(model):
            losses = model(X, Y)
            assert losses.shape == (4,)
            found = torch.stack(fastgrad.grad_sqnorm(losses, model, retain_graph=True), 1)
            truth = loss_norms(losses, model)
        assert relative_error(found, truth, 2e-16).max() < 1e-9


def generators_stay() -> None:
    """Neither norms nor features move a generator of a model that draws nothing, or set one back."""
    model = with_loss(lambda net, z, y: F.cross_entropy(z, y))
    for state in (random.getstate, torch.get_rng_state):
        before = state()
        recorded(model, lambda: model(X, Y))
        fastgrad.GradientFeatures(model.inner if hasattr(model, "inner") else parts(lambda net, x: net.head(x)))(X)
        after = state()
        if state is random.getstate:
            assert before == after


def second_output_constant() -> None:
    model = parts(lambda net, x: (net.head(x), torch.arange(3), {"size": 2}))

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        z, constant, more = model(x)
        assert constant.shape == (3,)
        assert more == {"size": 2}
        return z.square().sum(1)

    same(model, losses, X)


def constant_alone() -> None:
    """What does not depend on a sample is returned as it is, also where samples run one by one."""

    def function(net: Any, x: Tensor) -> Any:
        h = net.layer(x)
        at = (h > 0).nonzero(as_tuple=True)
        return net.head(torch.zeros_like(h).index_put(at, h[at])), torch.arange(3), h.sum(), net.head.weight

    model = parts(function)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        z, constant, total, weight = model(x)
        assert constant.shape == (3,)
        assert weight is model.head.weight
        assert total.shape == ((len(x),) if fastgrad_is_on() else ())
        return z.square().sum(1) + total

    same(model, losses, X)


def fastgrad_is_on() -> bool:
    from fastgrad.gradients.recorder import _active

    return bool(_active.stack)


def kept_by_hook() -> None:
    """A hook's list holds the batch's rows."""
    model, held = parts(lambda net, x: net.head(net.layer(x).tanh())), []
    model.layer.register_forward_hook(lambda _, __, out: held.append(out))
    with fastgrad.record(model):
        losses = squares(model, X)
        losses = losses + held[-1].square().sum(1)
        found = torch.stack(fastgrad.grad_sqnorm(losses, model), 1)
    plain = parts(lambda net, x: (h := net.layer(x), net.head(h.tanh())))
    plain.load_state_dict(model.state_dict())
    truth = of_samples(plain, lambda m, x: (o := m(x))[0].square().sum(1) + o[1].square().sum(1), X)
    assert relative_error(found, truth, 2e-16).max() < 1e-9


def same_shape_other_meaning() -> None:
    """An attribute that turns an output: where the batch is, the shapes of this call tell."""
    model = parts(lambda net, x: net.layer(x).transpose(0, 1) if net.turned else net.layer(x), turned=False)
    for turned in (False, True, False):
        model.turned = turned
        dims = (0, 2) if turned else (1, 2)
        truth = of_samples(model, lambda m, x, d=dims: m(x).square().sum(d), SEQUENCE)
        with fastgrad.record(model):
            out = model(SEQUENCE)
            assert out.shape == ((5, 4, 3) if turned else (4, 5, 3))
            found = torch.stack(fastgrad.grad_sqnorm(out.square().sum(dims), model), 1)
        assert relative_error(found, truth, 2e-16).max() < 1e-9


#: Rows that are right.
RIGHT: dict[str, Callable[[], None]] = {
    "BERT with labels after a batch of ones": bert,
    "GPT-2 with labels, unpadded and then padded": gpt2,
    "a head of zeros": functools.partial(zero_head, False),
    "a head of zeros, and after training": functools.partial(zero_head, True),
    "a hinge that begins at zero": hinge,
    "a weight annealed from zero": functools.partial(
        begins_at_zero, lambda net, z, y: F.cross_entropy(z, y) + net.weight * z.square().mean(), weight=0.5),
    "an auxiliary weight from zero": functools.partial(
        begins_at_zero, lambda net, z, y: net.weight * F.mse_loss(z, torch.zeros_like(z)), weight=0.5),
    "mean, then sum, by an attribute": functools.partial(reductions, "attribute"),
    "mean, then sum, by an argument": functools.partial(reductions, "argument"),
    "an integer that scales": integer,
    "a bias of attention at one length": attention_bias,
    "a scripted function that comes later": later_script,
    "a view of a parameter that comes later": later_view,
    "a state carried over": functools.partial(carried, warm=False, detach=True),
    "a state carried over with its graph": functools.partial(carried, warm=False, detach=False),
    "a state that an ordinary call began": functools.partial(carried, warm=True, detach=True),
    "a regulariser that forward returns": regulariser,
    "states of an LSTM": lstm_states,
    "square inputs, told": square_inputs_told,
    "the batch in another dimension": batch_in_another_dimension,
    "torch.func.grad inside": functools.partial(transformed, "grad"),
    "vmap of jacrev inside": functools.partial(transformed, "jacobian"),
    "in place under vmap inside": functools.partial(transformed, "in place"),
    "torch.mm by keyword": by_keyword,
    "losses (B,)": losses_of_samples,
    "threads": threads,
    "torch.compile after threads": compiled_after_threads,
    "compiled parts": functools.partial(compiled_parts, "wrapped"),
    "parts compiled in place": functools.partial(compiled_parts, "in place"),
    "another thread draws": draws_of_another_thread,
    "a dictionary of 300,000 words": large_dictionary,
    "two heads of one layer": tied_heads,
    "frozen and released": unfrozen_between,
    "a last batch that is smaller": last_batch_smaller,
    "several losses": multi_task,
    "a mask that leaves nothing": loss_of_mask,
    "a temperature": contrastive_temperature,
    "a loss scale": gradient_scale,
    "dropout": dropout_training,
    "generators": generators_stay,
    "constants among outputs": second_output_constant,
    "constants where samples run alone": constant_alone,
    "a tensor that a hook keeps": kept_by_hook,
    "an attribute that turns an output": same_shape_other_meaning,
}  # fmt: skip

#: Rows that are refused, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "a custom function chosen later, clipped": (later_custom, "model must have gradients in proportion"),
    "mixing beside a cast": (mixing, "model must treat the samples of a batch independently"),
    "positions of a submodule": (
        functools.partial(positions, lambda z: z.square().sum((1, 2))), "losses must each depend on their own row"),
    "positions of a submodule, summed": (
        functools.partial(positions, lambda z: z.square().sum()), r"losses must be losses of shape \(5,\)"),
    "a weight used outside": (outside, "losses must depend on 'head.weight' through recorded calls"),
    "weight decay": (decay, "losses must depend on 'head.weight' through recorded calls"),
    "a mean": (functools.partial(mean_loss, lambda z: z.square().mean()), r"it was a mean \(mean\)"),
    "a mean of cross-entropy": (
        functools.partial(mean_loss, lambda z: 3 * F.cross_entropy(z, Y) + 1), r"it was a mean \(nll_loss\)"),
    "a mean of squares": (
        functools.partial(mean_loss, lambda z: F.mse_loss(z, z.detach() + 1)), r"it was a mean \(mse_loss\)"),
    "a generator": (generator, "model must return tensors, not an iterator over them; its output was a generator"),
    "a reentrant checkpoint": (reentrant, "use use_reentrant=False"),
    "another structure by path": (functools.partial(differing, "structure"), "model must return"),
    "another number by path": (functools.partial(differing, "number"), r"all samples the same output \[1\]"),
    "another shape by path": (functools.partial(differing, "shape"), "model must return"),
    "another attribute by path": (functools.partial(differing, "attribute"), "the same attribute 'count'"),
    "another buffer by path": (functools.partial(differing, "buffer"), "model must write the same to its buffers"),
    "running statistics changed before the backward pass": (statistics, "modified by an inplace operation"),
    "square inputs": (square_inputs, "inputs must not be square in the batch; 1 was"),
    "layers made in forward": (creating, "model must not create layers or parameters in forward"),
}  # fmt: skip
