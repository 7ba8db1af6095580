"""What the graph behind outputs tells: whether several gradients go back at once, and whether a loss is a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import check_several, inputs, parts
from torch import Tensor, nn

from fastgrad.engine import graph

#: Functions of rows ``(B, 4)``, and others of images ``(B, 2, 4, 4)``.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name) for name in (
        "abs", "asin", "acos", "atan", "cos", "sin", "tan", "tanh", "exp", "erf", "log1p", "sigmoid", "neg",
    )
} | {
    "log": lambda x: (x + 2).log(), "sqrt": lambda x: (x + 2).sqrt(), "rsqrt": lambda x: (x + 2).rsqrt(),
    "reciprocal": lambda x: (x + 2).reciprocal(), "pow": lambda x: x.pow(3), "rsub": lambda x: torch.rsub(x, 2),
    "clamp": lambda x: x.clamp(-0.5, 0.5), "clamp_min": lambda x: x.clamp(min=0), "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1), "max": lambda x: x.max(1).values, "cumsum": lambda x: x.cumsum(1),
    "prod": lambda x: x.prod(1), "logsumexp": lambda x: x.logsumexp(1), "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1), "mean": lambda x: x.mean(1), "sum": lambda x: x.sum(1),
    "flip": lambda x: x.flip(1), "roll": lambda x: x.roll(1, 1), "repeat": lambda x: x.repeat(1, 2),
    "index": lambda x: x[:, [2, 0]], "index_select": lambda x: x.index_select(1, torch.tensor([1, 3])),
    "gather": lambda x: x.gather(1, x.argsort(1)), "masked_fill": lambda x: x.masked_fill(x.detach() > 0, 0.5),
    "where": lambda x: torch.where(x.detach() > 0, x, 2 * x), "tril": lambda x: x[:, :, None].expand(-1, 4, 4).tril(),
    "triu": lambda x: x[:, :, None].expand(-1, 4, 4).triu(), "split": lambda x: x.split(2, 1)[1],
    "unbind": lambda x: x.unbind(1)[2], "stack": lambda x: torch.stack([x, x.cos()], 1),
    "cat": lambda x: torch.cat([x, -x], 1),
    "bmm": lambda x: torch.bmm(x[:, :, None], x[:, None]), "dot": lambda x: (x * x.flip(1)).sum(1),
    "glu": lambda x: F.glu(x, 1),
    "gelu": F.gelu, "elu": F.elu, "silu": F.silu, "mish": F.mish, "softplus": F.softplus, "hardtanh": F.hardtanh,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu, "logsigmoid": F.logsigmoid,
    "relu": F.relu, "unfold": lambda x: x.unfold(1, 2, 1), "pad": lambda x: F.pad(x, (1, 1)),
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "to": lambda x: x.float().double(),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "permute": lambda x: x.unflatten(1, (2, 2)).permute(0, 2, 1),
}  # fmt: skip
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "conv": lambda x: F.conv2d(x, torch.ones(3, 2, 2, 2, dtype=x.dtype)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(2, dtype=x.dtype), torch.ones(2, dtype=x.dtype)),
}
#: Functions of ``(5, 4)`` whose nodes those of rows and images leave out.
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "Alias": torch.ops.aten.alias, "AsStrided": lambda x: x.as_strided((3, 2), (1, 5)),
    "Baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None, :4]), "ClampMin": lambda x: torch.clamp_min(x, 0.1),
    "Div": lambda x: x / (x.abs() + 2), "Dot": lambda x: x[0].dot(x[1]),
    "IndexSelect": lambda x: x.index_select(1, torch.tensor([1, 3])), "Mm": lambda x: x @ x.T,
    "Mv": lambda x: x.mv(x[0]), "ReshapeAlias": lambda x: torch.ops.aten._reshape_alias(x, (20,), (1,)),
    "Select": lambda x: x[2], "SplitWithSizes": lambda x: x.split([1, 3], 1)[1], "Sub": lambda x: x - x.cos(),
    "Transpose": lambda x: x.transpose(0, 1), "UnsafeSplit": lambda x: torch.unsafe_split(x, 2, 1)[1],
}  # fmt: skip


def kinds_of(out: Tensor) -> set[type]:
    return {type(node) for node in graph.nodes([out], inside=True) if type(node).__name__ != "AccumulateGrad"}


@pytest.mark.parametrize("name", PLAIN)
def test_several_gradients_of_plain_nodes(name: str) -> None:
    leaf = inputs(5, 4).requires_grad_()
    out = PLAIN[name](leaf.sin())
    assert any(kind.__name__.rstrip("0123456789") == f"{name}Backward" for kind in kinds_of(out))
    assert graph.batched_backward(kinds_of(out))
    gradients = inputs(3, *out.shape, seed=1)
    (found,) = torch.autograd.grad(out, leaf, gradients, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in gradients]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [*ROWS, *IMAGES])
def test_several_gradients_go_back_at_once(name: str) -> None:
    """Whether their nodes are listed or not, norms are those of each gradient and each sample."""
    function = ROWS.get(name) or IMAGES[name]

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x).tanh() * 0.9
        out = function(h if name in ROWS else h.repeat(1, 8).unflatten(1, (2, 4, 4)))
        return out.reshape(len(x), -1).cos()

    model, x = parts(forward, first=nn.Linear(3, 4)), inputs(5, 3)
    out = model(x)
    check_several(model, model, x, inputs(2, *out.shape, seed=1))
    left_out = {kind.__name__ for kind in kinds_of(out) if not graph.batched_backward([kind])}
    assert not left_out, left_out


def test_cdist_goes_back_one_gradient_at_a_time() -> None:
    x = torch.rand(3, 2, requires_grad=True)
    assert not graph.batched_backward(map(type, graph.nodes([torch.cdist(x, 2 * x)], inside=True)))


#: Scalars of losses ``z`` ``(B, 3)``, and the mean that they end in.
MEANS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean": (lambda z: z.mean(), "mean"),
    "mean of rows": (lambda z: z.sum(1).mean(0), "mean"),
    "scaled": (lambda z: 4 * z.mean() / 2 + 1, "mean"),
    "a term": (lambda z: z.sum() - z.square().mean(), "mean"),
    "stacked": (lambda z: torch.stack([z.mean(), z.sum()]).sum(), "mean"),
    "cross entropy": (lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2, 0])), "nll_loss"),
    "squares": (lambda z: F.mse_loss(z, 0 * z.detach()), "mse_loss"),
    "smooth": (lambda z: F.smooth_l1_loss(z, 0 * z.detach()), "smooth_l1_loss"),
    "binary": (lambda z: F.binary_cross_entropy_with_logits(z, 0 * z.detach()), "binary_cross_entropy_with_logits"),
    "sum": (lambda z: z.sum(), ""),
    "sum of means": (lambda z: z.mean(1).sum(), ""),
    "one sample": (lambda z: F.cross_entropy(z[:1], torch.tensor([0])) + z[:1].mean(), ""),
    "several losses": (lambda z: z.mean(1), ""),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_over_samples_are_told_from_sums(name: str) -> None:
    loss, mean = MEANS[name]
    assert graph.mean_over_samples([loss(inputs(4, 3).requires_grad_())]) == mean
