"""Other ways to the last layer's gradient norms: the textbook form, autograd, other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.micro.last_layer_inputs import Head
from bench.registry import Implementation, relative_error, scaled_error


def textbook(h: Tensor, z: Tensor) -> Tensor:
    """``(||p||^2 - 2 p_k + 1)(||h||^2 + 1)``, the textbook form."""
    p = z.float().softmax(-1)
    squares = p.square().sum(-1, keepdim=True)
    return (squares - 2 * p + 1) * (h.float().square().sum(-1, keepdim=True) + 1)


def compiled(function: Callable[..., Any], *tensors: Tensor) -> Callable[[], Any]:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: compiled(*tensors)


def loop(head_: Head) -> Callable[[], Tensor]:
    """One backward pass for every sample and contrast."""
    weight = head_.weight.float().requires_grad_()
    bias = head_.bias.float().requires_grad_()
    h = head_.h.float()

    def call() -> Tensor:
        rows = []
        for sample in h:
            logits = F.linear(sample, weight, bias)
            norms = []
            for k in range(logits.shape[-1]):
                loss = F.cross_entropy(logits, torch.tensor(k, device=h.device))
                grads = torch.autograd.grad(loss, (weight, bias), retain_graph=True)
                norms.append(sum(g.square().sum() for g in grads))
            rows.append(torch.stack(norms))  # type: ignore[arg-type]
        return torch.stack(rows)

    return call


def vmap(head_: Head, memory: int = 1 << 28) -> Callable[[], Tensor]:
    """``vmap`` over samples and contrasts of ``grad``, in chunks that keep the gradients within ``memory`` bytes."""
    weight, bias, h = head_.weight.float(), head_.bias.float(), head_.h.float()
    B, N, D = head_.shape

    def loss(weight: Tensor, bias: Tensor, sample: Tensor, k: Tensor) -> Tensor:
        return -F.linear(sample, weight, bias).log_softmax(-1).gather(-1, k.unsqueeze(-1)).squeeze(-1)

    def norm(sample: Tensor, k: Tensor) -> Tensor:
        g_weight, g_bias = torch.func.grad(loss, argnums=(0, 1))(weight, bias, sample, k)
        return g_weight.square().sum() + g_bias.square().sum()

    chunk = max(1, min(B * N, memory // (4 * N * D)))
    batched = torch.func.vmap(norm, chunk_size=chunk)
    samples = torch.arange(B, device=h.device).repeat_interleave(N)
    classes = torch.arange(N, device=h.device).repeat(B)
    return lambda: batched(h[samples], classes).reshape(B, N)


def openood(head_: Head) -> Callable[[], Tensor]:
    """OpenOOD's postprocessor: one backward pass a sample through the last layer, L1 norm of its weight gradient."""
    h = head_.h.float()
    layer = torch.nn.Linear(h.shape[1], head_.weight.shape[0], device=h.device)
    layer.load_state_dict({"weight": head_.weight.float(), "bias": head_.bias.float()})

    def call() -> Tensor:
        confs = []
        for sample in h:
            layer.zero_grad()
            logits = layer(sample[None])
            targets = torch.ones_like(logits) / logits.shape[1]
            loss = torch.mean(torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1))
            loss.backward()
            assert layer.weight.grad is not None
            confs.append(layer.weight.grad.abs().sum())
        return torch.stack(confs)

    return call


def pytorch_ood(head_: Head) -> Callable[[], Tensor]:
    from pytorch_ood.detector import GradNorm

    h = head_.h.float()
    layer = torch.nn.Linear(h.shape[1], head_.weight.shape[0], device=h.device)
    layer.load_state_dict({"weight": head_.weight.float(), "bias": head_.bias.float()})
    detector = GradNorm(layer, param_filter=lambda name: name == "weight").to(h.device)
    return lambda: detector.predict(h)


def neighbours(head_: Head, product: Tensor) -> Iterator[Implementation]:
    """Fused linear losses: one number a sample of the same product, so neighbours in bandwidth, not peers."""
    h, weight, bias = head_.h, head_.weight, head_.bias
    labels = torch.arange(h.shape[0], device=h.device) % weight.shape[0]
    losses = F.cross_entropy(product, labels, reduction="none")

    def liger() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: loss(weight, h, labels, bias)

    def cut() -> Callable[[], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(h, weight, labels, bias=bias, reduction="none")

    yield Implementation(
        "Liger fused linear loss", liger, lambda out: relative_error(out, losses.sum()), 0.05, graph=False
    )
    yield Implementation("Cut Cross-Entropy", cut, lambda out: scaled_error(out, losses), 0.05, graph=False)
