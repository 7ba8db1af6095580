"""Every rule takes the arguments of its function by name, as PyTorch's own functions do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import check, inputs, parts
from torch import Tensor, nn

from fastgrad.layers import RULES

S = (1,)
#: Calls by name alone of functions of rows ``(B, 3)``.
CALLS: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    F.linear: lambda net, x: F.linear(input=x, weight=net.matrix, bias=net.scale),
    torch.matmul: lambda net, x: torch.matmul(input=x, other=net.matrix),
    Tensor.matmul: lambda net, x: x.matmul(net.matrix),
    Tensor.__matmul__: lambda net, x: x @ net.matrix,
    torch.mm: lambda net, x: torch.mm(input=x, mat2=net.matrix),
    torch.addmm: lambda net, x: torch.addmm(input=net.scale, mat1=x, mat2=net.matrix, beta=1, alpha=1),
    F.embedding: lambda net, x: F.embedding(input=(x > 0).long(), weight=net.matrix, padding_idx=2).sum(1),
    F.embedding_bag: lambda net, x: F.embedding_bag(input=(x > 0).long(), weight=net.matrix, mode="sum"),
    F.batch_norm: lambda net, x: F.batch_norm(
        input=x, running_mean=net.mean, running_var=net.var, weight=net.scale, bias=net.shift, training=False),
    F.group_norm: lambda net, x: F.group_norm(input=x, num_groups=1, weight=net.scale, bias=net.shift),
    F.instance_norm: lambda net, x: F.instance_norm(
        input=x[:, :, None].expand(-1, 3, 2) * net.ramp, weight=net.scale, bias=net.shift).sum(2),
    F.layer_norm: lambda net, x: F.layer_norm(input=x, normalized_shape=(3,), weight=net.scale, bias=net.shift),
    F.rms_norm: lambda net, x: F.rms_norm(input=x, normalized_shape=(3,), weight=net.scale),
    F.dropout: lambda net, x: F.dropout(input=x, p=0.5, training=False) * net.scale,
    F.scaled_dot_product_attention: lambda net, x: F.scaled_dot_product_attention(
        query=net.layer(x)[:, None, :, None], key=x[:, None, :, None], value=x[:, None, :, None])[:, 0, :, 0],
    **{
        getattr(torch, f"conv{n}d"): lambda net, x, n=n: getattr(torch, f"conv{n}d")(
            input=x.reshape(-1, 3, *S * n), weight=net.matrix.reshape(3, 3, *S * n), bias=net.scale, stride=1,
            padding=0, dilation=1, groups=1).flatten(1)
        for n in (1, 2, 3)
    },
    **{
        getattr(torch, f"conv_transpose{n}d"): lambda net, x, n=n: getattr(torch, f"conv_transpose{n}d")(
            input=x.reshape(-1, 3, *S * n), weight=net.matrix.reshape(3, 3, *S * n), bias=net.scale, stride=1,
            padding=0, output_padding=0, groups=1, dilation=1).flatten(1)
        for n in (1, 2, 3)
    },
    **{
        function: lambda net, x, f=function, more=more: f(
            input=net.layer(x).repeat(1, 8).reshape(-1, 3, 8), **more)[..., 0]
        for function, more in ((F.max_pool1d, {"kernel_size": 2}), (F.avg_pool1d, {"kernel_size": 2}),
                               (F.adaptive_avg_pool1d, {"output_size": 2}), (F.interpolate, {"scale_factor": 2}))
    },
}  # fmt: skip
#: Functions that are called by place alone: recurrent ones, by modules of PyTorch, and images of other dimensions.
BY_PLACE = {"lstm", "gru", "rnn_tanh", "rnn_relu"} | {
    f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (2, 3)
}


def test_every_rule_is_in_the_table() -> None:
    left_out = {getattr(function, "__name__", "") for function in RULES.keys() - CALLS.keys()}
    assert {name.removeprefix("boolean_dispatch").removeprefix("_") for name in left_out} <= BY_PLACE | {"fn"}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: getattr(function, "__name__", str(function)))
def test_a_rule_takes_keywords(function: Any) -> None:
    model = parts(
        lambda net, x: net.head(CALLS[function](net, x).tanh()),
        shift=nn.Parameter(torch.rand(3)),
        mean=nn.Buffer(torch.rand(3)),
        var=nn.Buffer(torch.rand(3) + 0.5),
        ramp=nn.Buffer(torch.tensor([1.0, 3.0])),
    )
    check(model, (inputs(5, 3),))
