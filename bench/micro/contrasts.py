"""The last layer: squared gradient norms of all contrasts, of one target, and the layer fused with them.

Errors allowed, relative to float64: 1e-5 for fastgrad, 1e-3 for the peers, whose float32 autograd loses digits where
a probability is near one; 64 units of the dtype, relative to the largest entry, for logits and other plain products.

``rows`` is the first layer of the introspective classifier: on stored contrast rows, and on rows that are never formed.
Allowed there, relative to the largest entry: sqrt(N D) roundings of the working precision for float32, 2^-6 for halves,
whose rows are rounded once more than in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.registry import SEED, Implementation, case, relative_error, scaled_error

OURS, PEERS = 1e-5, 1e-3
FORMS = ("fastgrad Triton", "fastgrad eager")
TITLE = " B={0} N={1} D={2} {3}"
TINY = [(3, 5, 8), (2, 33, 16)]
QUICK = [(64, 10, 512), (1, 1000, 512), (256, 1000, 512)]
FULL = [
    (1, 10, 512), (64, 10, 512), (4096, 10, 512), (1, 1000, 512), (8, 1000, 512), (32, 1000, 512), (256, 1000, 512),
    (4096, 1000, 512), (1, 32000, 768), (32, 32000, 768), (256, 32000, 768), (1, 128256, 1024), (8, 128256, 1024),
]  # fmt: skip


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

    @cached_property
    def factor(self) -> Tensor:
        """``||h||^2 + 1`` in float64, ``(B, 1)``."""
        return self.h.double().square().sum(-1, keepdim=True) + 1

    def norms(self, logits: Tensor) -> Tensor:
        """Return all contrasts' squared norms in float64, by leave-one-out sums."""
        p = logits.double().softmax(-1)
        top = p.argmax(-1, keepdim=True)
        rest = p.scatter(-1, top, 0.0)
        s1, s2 = rest.sum(-1, keepdim=True), rest.square().sum(-1, keepdim=True)
        # 1 - p_k keeps its digits in float64 for every k but the largest.
        norms = (1 - rest).square() + (p.square().sum(-1, keepdim=True) - rest.square())
        return norms.scatter(-1, top, s1.square() + s2) * self.factor

    def module(self) -> torch.nn.Linear:
        """Return the last layer as a module, in float32."""
        layer = torch.nn.Linear(self.h.shape[1], len(self.bias), device=self.h.device)
        layer.load_state_dict({"weight": self.weight.float(), "bias": self.bias.float()})
        return layer


def textbook(h: Tensor, z: Tensor) -> Tensor:
    """Return ``(||p||^2 - 2 p_k + 1)(||h||^2 + 1)``, the textbook form."""
    p = z.float().softmax(-1)
    squares = p.square().sum(-1, keepdim=True)
    return (squares - 2 * p + 1) * (h.float().square().sum(-1, keepdim=True) + 1)


def stable(h: Tensor, z: Tensor) -> Tensor:
    """Return the same norms by leave-one-out sums, which keep their digits where the network is confident."""
    p = z.float().softmax(-1)
    top = p.argmax(-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0)
    s1, s2 = rest.sum(-1, keepdim=True), rest.square().sum(-1, keepdim=True)
    norms = (p.square().sum(-1, keepdim=True) - 2 * p + 1).scatter(-1, top, s1.square() + s2)
    return norms * (h.float().square().sum(-1, keepdim=True) + 1)


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


def _at(shapes: list[tuple[int, int, int]], dtype: str = "float32") -> list[tuple[Any, ...]]:
    return [(*shape, dtype) for shape in shapes]


def _forms(
    call: Callable[..., Any], check: Callable[[Any], float], tolerance: float, device: str
) -> Iterator[Implementation]:
    """Yield the eager form of an operator and, on a GPU, its kernels; ``call`` takes the operator's ``impl``."""
    for impl, name in zip(("triton", "eager"), FORMS, strict=True):
        if impl == "eager" or device == "cuda":
            yield Implementation(name, lambda impl=impl: partial(call, impl=impl), check, tolerance)  # type: ignore[misc]


def _softmax(head_: Head) -> Implementation:
    check = partial(scaled_error, reference=head_.z.double().softmax(-1))
    return Implementation("torch.softmax", lambda: partial(torch.softmax, head_.z, -1), check, head_.unit)


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


def _linear(head_: Head) -> Implementation:
    check = partial(scaled_error, reference=head_.exact)
    return Implementation("linear alone", lambda: partial(F.linear, *head_.layer), check, head_.unit)


@case(
    "last-layer", "contrasts" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.softmax", "closed form, textbook", "closed form, torch.compile",
           "stable form, torch.compile", "vmap(grad)", "autograd loop"),
    tiny=_at(TINY), quick=_at(QUICK),
    full=[*_at(FULL), (256, 1000, 512, "float16"), (256, 1000, 512, "bfloat16")],
    gpu=[*_at([(4096, 32000, 4096), (256, 1000, 2048)], "bfloat16"), (8, 1000, 512, "float32")],
)  # fmt: skip
def contrasts(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """Squared norms of all contrasts, from features and logits; peers that differentiate start from the features."""
    head_ = Head(B, N, D, dtype, device)
    h, z = head_.h, head_.z

    def check(norms: Tensor) -> float:
        return relative_error(norms, head_.norms(z))

    yield from _forms(partial(fastgrad.contrast_sqnorm, h, z), check, OURS, device)
    yield _softmax(head_)
    yield Implementation("closed form, textbook", lambda: partial(textbook, h, z), check, PEERS)
    yield Implementation("closed form, torch.compile", partial(compiled, textbook, h, z), check, PEERS)
    yield Implementation("stable form, torch.compile", partial(compiled, stable, h, z), check, PEERS)
    # Above this size, a call of these two takes seconds.
    if B * N <= 2_000:
        yield Implementation("vmap(grad)", partial(vmap, head_), check, PEERS, graph=False)
        yield Implementation("autograd loop", partial(loop, head_), check, PEERS, graph=False)


@case(
    "last-layer", "head" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form", "the same, torch.compile"),
    tiny=_at(TINY), quick=_at(QUICK), full=_at(FULL),
    gpu=_at([(1024, 32000, 4096), *((B, 1000, 2048) for B in (1, 8, 32, 256))], "bfloat16"),
)  # fmt: skip
def head(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """The layer and all contrasts; norms are judged for the logits each implementation returned."""
    head_ = Head(B, N, D, dtype, device)

    def check(out: tuple[Tensor, Tensor]) -> float:
        logits, norms = out
        if scaled_error(logits, head_.exact) > head_.unit:
            return float("inf")
        return relative_error(norms, head_.norms(logits))

    def unfused(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, bias)
        return z, textbook(h, z)

    layer = head_.layer
    yield from _forms(partial(fastgrad.linear_contrast_sqnorm, *layer), check, OURS, device)
    yield _linear(head_)
    yield Implementation("linear, softmax, closed form", lambda: partial(unfused, *layer), check, PEERS)
    yield Implementation("the same, torch.compile", partial(compiled, unfused, *layer), check, PEERS)


@case(
    "last-layer", "uniform target" + TITLE, against="torch.softmax",
    names=(*FORMS, "torch.softmax", "GradNorm, as OpenOOD", "GradNorm, pytorch-ood"),
    tiny=_at(TINY), quick=_at(QUICK[:1]), full=_at([s for s in FULL if s[0] > 1]),
    gpu=_at([(64, 1000, 2048)], "bfloat16"),
)  # fmt: skip
def uniform(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """One norm per sample for the uniform target; GradNorm's own norm is L1 and is checked as such."""
    head_ = Head(B, N, D, dtype, device)
    h, z = head_.h, head_.z
    delta = z.double().softmax(-1) - 1 / N
    check = partial(relative_error, reference=delta.square().sum(-1) * head_.factor.squeeze(-1))
    yield from _forms(partial(fastgrad.target_sqnorm, h, z, "uniform"), check, OURS, device)
    yield _softmax(head_)
    absolute = delta.abs().sum(-1) * h.double().abs().sum(-1)
    tolerance = PEERS if dtype == "float32" else 0.1
    # OpenOOD's confidence is the norm itself; pytorch-ood's score, higher for outliers, is minus the norm. pytorch-ood
    # stores every sample's gradient: 8 GiB of them at most.
    for name, peer, limit, reference in (
        ("GradNorm, as OpenOOD", openood, 64, absolute),
        ("GradNorm, pytorch-ood", pytorch_ood, min(256, 2**31 // (N * D)), -absolute),
    ):
        if limit >= B:
            check = partial(relative_error, reference=reference)
            yield Implementation(name, partial(peer, head_), check, tolerance, graph=False)


@case(
    "last-layer", "statistics" + TITLE, against="linear alone",
    names=(*FORMS, "linear alone", "linear, softmax, closed form", "loss alone, Liger",
           "loss alone, Cut Cross-Entropy"),
    tiny=_at(TINY[-1:]), quick=_at(QUICK[-1:]), full=_at(FULL[-1:]), gpu=_at([(1024, 128256, 4096)], "bfloat16"),
)  # fmt: skip
def statistics(B: int, N: int, D: int, dtype: str, device: str) -> Iterator[Implementation]:
    """Minimum, maximum, mean, expectation and predicted contrast, without the matrix."""
    head_ = Head(B, N, D, dtype, device)

    def summed(norms: Tensor, z: Tensor) -> Tensor:
        top = norms.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
        expected = (z.softmax(-1) * norms).sum(-1)
        return torch.stack([norms.amin(-1), norms.amax(-1), norms.mean(-1), expected, top], -1)

    wanted = summed(head_.norms(head_.exact), head_.exact)
    # The norms follow the logits, whose products round by units of the dtype.
    tolerance = head_.unit * float(head_.exact.abs().max())

    def unfused() -> Tensor:
        z = F.linear(*head_.layer)
        return summed(textbook(head_.h, z), z.float())

    def check(out: Any) -> float:
        return relative_error(torch.stack(list(out), -1) if isinstance(out, tuple) else out, wanted)

    yield from _forms(partial(fastgrad.linear_contrast_stats, *head_.layer), check, tolerance, device)
    yield _linear(head_)
    yield Implementation("linear, softmax, closed form", lambda: unfused, check, max(PEERS, tolerance))
    yield from loss_alone(head_, device)


@case(
    "rows", "rows B={0} N={1} D={2} U={3} {4}", against="stored rows",
    names=("fastgrad", "stored rows", "rows written, then linear"),
    tiny=[(3, 5, 8, 7, "float32")], quick=[(64, 10, 512, 300, "float32")],
    full=[(*shape, "float32") for shape in (
        (1, 10, 64, 300), (256, 10, 64, 300), (1, 10, 512, 300), (64, 10, 512, 300), (1024, 10, 512, 300),
        (1, 1000, 512, 64), (32, 1000, 512, 64),
    )],
    gpu=[(64, 10, 512, 300, "bfloat16"), (32, 1000, 2048, 128, "bfloat16")],
)  # fmt: skip
def rows(B: int, N: int, D: int, U: int, name: str, device: str) -> Iterator[Implementation]:
    """``contrast_rows_linear`` against a product with rows in memory."""
    dtype = getattr(torch, name)
    h, z, weight, bias = normals(device, (B, D), (B, N), (U, N * D), (U,), dtype=dtype)
    exact = 2 * (z.double() - 1).unsqueeze(-1) * h.double().unsqueeze(-2)
    wanted = F.linear(exact.flatten(-2), weight.double(), bias.double())
    tolerance = 2.0**-6 if dtype != torch.float32 else 2.0**-23 * (N * D) ** 0.5
    check = partial(scaled_error, reference=wanted)
    stored = (2 * (z.float() - 1).unsqueeze(-1) * h.float().unsqueeze(-2)).flatten(-2).to(dtype)

    def written() -> Tensor:
        return F.linear(fastgrad.contrast_rows(h, z).flatten(-2).to(dtype), weight, bias)

    ours = partial(fastgrad.contrast_rows_linear, h, z, weight, bias)
    yield Implementation("fastgrad", lambda: ours, check, tolerance)
    yield Implementation("stored rows", lambda: lambda: F.linear(stored, weight, bias), check, tolerance)
    yield Implementation("rows written, then linear", lambda: written, check, tolerance)
