"""The inputs of the last layer's cases, and other ways to the same norms.

Errors allowed, relative to float64: 1e-3, because autograd in float32 loses digits where a probability is near one; 64
units of the dtype, relative to the largest entry, for logits and other plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import SEED, Implementation, scaled_error


def normals(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Yield seeded normal numbers of each shape."""
    made = torch.Generator(device).manual_seed(SEED)
    for shape in shapes:
        yield torch.randn(shape, generator=made, device=device).to(dtype)


class Head:
    """Seeded features, weights and logits of spread 3, and references in float64."""

    def __init__(self, B: int, N: int, D: int, dtype: str, device: str) -> None:
        kind = getattr(torch, dtype)
        h, weight, bias = normals(device, (B, D), (N, D), (N,))
        self.h, self.weight, self.bias = h.to(kind), (weight * 3 / D**0.5).to(kind), bias.to(kind)
        self.layer = (self.h, self.weight, self.bias)
        self.z = F.linear(*self.layer)
        #: Error allowed for a plain product, relative to its largest entry.
        self.unit = 64 * torch.finfo(kind).eps

    @cached_property
    def exact(self) -> Tensor:
        """The logits in float64."""
        return F.linear(*(t.double() for t in self.layer))

    def norms(self, logits: Tensor) -> Tensor:
        """Return all contrasts' squared norms in float64, by leave-one-out sums."""
        return stable(self.h, logits, torch.float64)

    def module(self) -> torch.nn.Linear:
        """Return the last layer as a module, in float32."""
        layer = torch.nn.Linear(self.h.shape[1], len(self.bias), device=self.h.device)
        layer.load_state_dict({"weight": self.weight.float(), "bias": self.bias.float()})
        return layer


def factor(h: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """Return ``||h||^2 + 1``, ``(B, 1)``."""
    return h.to(kind).square().sum(-1, keepdim=True) + 1


def textbook(h: Tensor, z: Tensor) -> Tensor:
    """Return ``(||p||^2 - 2 p_k + 1)(||h||^2 + 1)``, the textbook form."""
    p = z.float().softmax(-1)
    return (p.square().sum(-1, keepdim=True) - 2 * p + 1) * factor(h)


def stable(h: Tensor, z: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """Return the same norms by leave-one-out sums, which keep their digits where the network is confident."""
    p = z.to(kind).softmax(-1)
    top = p.argmax(-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0)
    s1, s2 = rest.sum(-1, keepdim=True), rest.square().sum(-1, keepdim=True)
    norms = (p.square().sum(-1, keepdim=True) - 2 * p + 1).scatter(-1, top, s1.square() + s2)
    return norms * factor(h, kind)


def formula(h: Tensor, z: Tensor) -> Tensor:
    """Return the same norms without a term that cancels, in operations that a compiler fuses."""
    m = z.amax(-1, keepdim=True)
    e, top = torch.exp(z - m).float(), z == m
    rest, ties = torch.where(top, 0.0, e), top.float().sum(-1, keepdim=True) - 1
    s1, s2 = rest.sum(-1, keepdim=True) + ties, rest.square().sum(-1, keepdim=True) + ties
    return factor(h) * ((s1 * s1 + s2) / (1 + s1).square() + 2 * (1 - e) / (1 + s1))


def compiled(function: Callable[..., Any], *tensors: Tensor) -> Callable[[], Any]:
    torch._dynamo.reset()
    return partial(torch.compile(function, fullgraph=True, dynamic=False), *tensors)


def loop(head_: Head) -> Callable[[], Tensor]:
    """Return norms by one backward pass for every sample and contrast."""
    h, layer = head_.h.float(), head_.module()
    classes = torch.arange(len(head_.bias), device=h.device)

    def norm(logits: Tensor, k: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, k)
        g_weight, g_bias = torch.autograd.grad(loss, (layer.weight, layer.bias), retain_graph=True)
        return g_weight.square().sum() + g_bias.square().sum()

    def norms(sample: Tensor) -> Tensor:
        logits = layer(sample)
        return torch.stack([norm(logits, k) for k in classes])

    return lambda: torch.stack([norms(sample) for sample in h])


def vmap(head_: Head, memory: int = 1 << 28) -> Callable[[], Tensor]:
    """Return norms by ``vmap`` of ``grad`` over samples and contrasts; a chunk's gradients take ``memory`` bytes."""
    weight, bias, h = head_.weight.float(), head_.bias.float(), head_.h.float()
    (N, D), B = weight.shape, len(h)

    def loss(weight: Tensor, bias: Tensor, sample: Tensor, k: Tensor) -> Tensor:
        return -F.linear(sample, weight, bias).log_softmax(-1).gather(-1, k.unsqueeze(-1)).squeeze(-1)

    def norm(sample: Tensor, k: Tensor) -> Tensor:
        g_weight, g_bias = torch.func.grad(loss, argnums=(0, 1))(weight, bias, sample, k)
        return g_weight.square().sum() + g_bias.square().sum()

    batched = torch.func.vmap(norm, chunk_size=max(1, min(B * N, memory // (4 * N * D))))
    samples = torch.arange(B, device=h.device).repeat_interleave(N)
    classes = torch.arange(N, device=h.device).repeat(B)
    return lambda: batched(h[samples], classes).reshape(B, N)


def openood(head_: Head) -> Callable[[], Tensor]:
    """OpenOOD's postprocessor: one backward pass per sample through the last layer, L1 norm of its weight gradient."""
    h, layer = head_.h.float(), head_.module()

    def norm(sample: Tensor) -> Tensor:
        layer.zero_grad()
        logits = layer(sample[None])
        targets = torch.ones_like(logits) / logits.shape[1]
        torch.mean(torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1)).backward()
        return layer.weight.grad.abs().sum()

    return lambda: torch.stack([norm(sample) for sample in h])


def pytorch_ood(head_: Head) -> Callable[[], Tensor]:
    from pytorch_ood.detector import GradNorm

    h = head_.h.float()
    detector = GradNorm(head_.module(), param_filter=lambda name: name == "weight").to(h.device)
    return lambda: detector.predict(h)


def loss_alone(head_: Head, device: str) -> Iterator[Implementation]:
    """Yield kernels that compute the mean cross-entropy of a linear layer without its logits, and no norms."""
    labels = torch.arange(len(head_.h), device=device) % len(head_.bias)
    plain = F.cross_entropy(head_.exact - head_.bias.double(), labels)

    def liger() -> Callable[[], Tensor]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return partial(liger_fused_linear_cross_entropy, head_.h, head_.weight, labels)

    def cut() -> Callable[[], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        return partial(linear_cross_entropy, head_.h, head_.weight, labels)

    check = partial(scaled_error, reference=plain)
    for name, peer in (("loss alone, Liger", liger), ("loss alone, Cut Cross-Entropy", cut)):
        if device == "cuda":
            yield Implementation(name, peer, check, 10 * head_.unit)
