"""The last layer: squared gradient norms of all contrasts, of one target, and the layer fused with them.

Four tasks. ``contrasts``: features and logits in, ``(B, N)`` out. ``uniform target``: one norm a sample, the task of
GradNorm. ``head``: features and weights in, logits and ``(B, N)`` out. ``statistics``: the same, five numbers a
sample out.

Errors allowed, relative to float64: 1e-5 for fastgrad, 1e-3 for the peers, whose float32 autograd loses digits where
a probability is near one; 64 units of the dtype, relative to the largest entry, for logits and other plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.harness import Case, Implementation, relative_error, scaled_error

OURS, PEERS = 1e-5, 1e-3
#: Contrasts times samples up to which the slow peers take part: a call of theirs takes seconds beyond.
LOOP_LIMIT, VMAP_LIMIT = 2_000, 2_000

Shape = tuple[int, int, int]
SHAPES: dict[tuple[str, str], list[Shape]] = {
    ("tiny", "cpu"): [(3, 5, 8), (2, 33, 16)],
    ("quick", "cpu"): [(64, 10, 512), (1, 1000, 512), (256, 1000, 512)],
    ("full", "cpu"): [
        (1, 10, 512), (64, 10, 512), (4096, 10, 512),
        (1, 1000, 512), (8, 1000, 512), (32, 1000, 512), (256, 1000, 512), (4096, 1000, 512),
        (1, 32000, 768), (32, 32000, 768), (256, 32000, 768), (1, 128256, 1024), (8, 128256, 1024),
    ],
    ("quick", "cuda"): [(1, 1000, 2048), (256, 1000, 2048), (1024, 32000, 4096)],
    ("full", "cuda"): [
        (4096, 10, 512), (1, 1000, 2048), (8, 1000, 2048), (32, 1000, 2048), (256, 1000, 2048), (4096, 1000, 2048),
        (32, 32000, 4096), (1024, 32000, 4096), (4096, 32000, 4096), (1, 128256, 4096), (1024, 128256, 4096),
    ],
}  # fmt: skip


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    shapes = SHAPES["tiny" if size == "tiny" else size, "cpu" if size == "tiny" else device]
    main = torch.bfloat16 if device == "cuda" else torch.float32
    halves = (256, 1000, 512) if device == "cpu" else (256, 1000, 2048)
    for shape in shapes:
        dtypes = [main]
        if size != "quick" and shape == halves:
            dtypes += [d for d in (torch.float32, torch.float16, torch.bfloat16) if d != main]
        for dtype in dtypes:
            yield _case("contrasts", contrasts, shape, dtype, device, seed, "torch.softmax")
            if dtype == main:
                yield _case("head", head, shape, dtype, device, seed, "linear alone")
    for shape in shapes[:2] if size != "full" else shapes:
        if shape[0] > 1:
            yield _case("uniform target", uniform, shape, main, device, seed, "torch.softmax")
    yield _case("statistics", statistics, shapes[-1], main, device, seed, "linear alone")


def gpu_cases(device: str = "cuda", seed: int = 0, tiny: bool = False) -> Iterator[Case]:
    """The sizes that the kernels have targets for, without compiled peers except once."""
    if tiny:
        yield _case(
            "contrasts", contrasts, (3, 5, 8), torch.float32, device, seed, "torch.softmax", ("compile",)
        )
        yield _case("head", head, (2, 33, 16), torch.float32, device, seed, "linear alone", ("compile",))
        return
    half = torch.bfloat16
    slow = ("compile", "loop", "vmap")
    yield _case("contrasts", contrasts, (4096, 32000, 4096), half, device, seed, "torch.softmax", slow)
    yield _case("contrasts", contrasts, (256, 1000, 2048), half, device, seed, "torch.softmax", ("loop",))
    yield _case(
        "contrasts", contrasts, (8, 1000, 512), torch.float32, device, seed, "torch.softmax", ("compile",)
    )
    yield _case("head", head, (1024, 32000, 4096), half, device, seed, "linear alone")
    for B in (1, 8, 32, 256):
        yield _case("head", head, (B, 1000, 2048), half, device, seed, "linear alone", slow)
    yield _case("statistics", statistics, (1024, 128256, 4096), half, device, seed, "linear alone", slow)
    yield _case("uniform target", uniform, (64, 1000, 2048), half, device, seed, "torch.softmax")


def _case(
    task: str, build: Callable[..., list[Implementation]], shape: Shape, dtype: torch.dtype, device: str, seed: int,
    relative_to: str, without: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    B, N, D = shape
    name = str(dtype).removeprefix("torch.")
    return Case(
        f"{task} B={B} N={N} D={D} {name}",
        lambda: [
            item
            for item in build(shape, dtype, device, seed)
            if not any(word in item.name for word in without)
        ],
        relative_to,
    )


def work(task: str, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that any implementation of a task must read and write, and the operations of its product."""
    B, N, D = shape
    element = dtype.itemsize
    moved = {
        "contrasts": B * N * (element + 4) + B * D * element,
        "uniform target": B * N * element + B * D * element + 4 * B,
        "head": (B + N) * D * element + B * N * (element + 4),
        "statistics": (B + N) * D * element + 20 * B,
    }[task]
    return moved, 2 * B * N * D if task in ("head", "statistics") else 0


class Head:
    """Seeded features, weights and logits of spread 3, in the dtype of the case, and what float64 makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seed: int) -> None:
        B, N, D = shape
        made = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=made, device=device)

        self.shape, self.dtype, self.device = shape, dtype, device
        self.h = normal(B, D).to(dtype)
        self.weight = (normal(N, D) * 3 / D**0.5).to(dtype)
        self.bias = normal(N).to(dtype)
        self.z = F.linear(self.h, self.weight, self.bias)

    def factor(self) -> Tensor:
        """``||h||^2 + 1`` in float64, ``(B, 1)``."""
        return self.h.double().square().sum(-1, keepdim=True) + 1

    def norms(self, logits: Tensor) -> Tensor:
        """All contrasts' squared norms in float64, by leave-one-out sums."""
        p = logits.double().softmax(-1)
        top = p.argmax(-1, keepdim=True)
        rest = p.scatter(-1, top, 0.0)
        s1, s2 = rest.sum(-1, keepdim=True), rest.square().sum(-1, keepdim=True)
        # 1 - p_k keeps its digits in float64 for every k but the largest.
        norms = (1 - rest).square() + (p.square().sum(-1, keepdim=True) - rest.square())
        return norms.scatter(-1, top, s1.square() + s2) * self.factor()

    def error(self, found: Tensor) -> float:
        """Relative error of all contrasts for the case's own logits."""
        return relative_error(found, self.norms(self.z))


def textbook(h: Tensor, z: Tensor) -> Tensor:
    """``(||p||^2 - 2 p_k + 1)(||h||^2 + 1)``, as one writes it down first."""
    p = z.float().softmax(-1)
    squares = p.square().sum(-1, keepdim=True)
    return (squares - 2 * p + 1) * (h.float().square().sum(-1, keepdim=True) + 1)


def _fastgrad(call: Callable[[str], Any], check: Callable[[Any], float], device: str) -> list[Implementation]:
    """The eager form, and on a GPU the kernels."""
    found = [Implementation("fastgrad eager", lambda: lambda: call("eager"), check, OURS)]
    if device == "cuda":
        found.insert(0, Implementation("fastgrad Triton", lambda: lambda: call("triton"), check, OURS))
    return found


def contrasts(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """Squared norms of all contrasts, from features and logits; peers that differentiate start from the features."""
    head_ = Head(shape, dtype, device, seed)
    B, N, _ = shape
    h, z = head_.h, head_.z
    unit = 64 * torch.finfo(dtype).eps
    found = _fastgrad(lambda impl: fastgrad.contrast_sqnorm(h, z, impl=impl), head_.error, device)
    found.append(
        Implementation(
            "torch.softmax", lambda: lambda: torch.softmax(z, -1),
            lambda out: scaled_error(out, z.double().softmax(-1)), unit,
        )
    )  # fmt: skip
    found.append(Implementation("closed form, textbook", lambda: lambda: textbook(h, z), head_.error, PEERS))
    found.append(
        Implementation("closed form, torch.compile", lambda: _compiled(textbook, h, z), head_.error, PEERS)
    )
    if dtype == torch.float32 or device == "cuda":
        tolerance = PEERS if dtype == torch.float32 else 1.0
        if B * N <= VMAP_LIMIT:
            found.append(
                Implementation("vmap(grad)", lambda: _vmap(head_), head_.error, tolerance, graph=False)
            )
        if B * N <= LOOP_LIMIT:
            found.append(
                Implementation("autograd loop", lambda: _loop(head_), head_.error, tolerance, graph=False)
            )
    return found


def _compiled(function: Callable[..., Any], *tensors: Tensor) -> Callable[[], Any]:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: compiled(*tensors)


def _loop(head_: Head) -> Callable[[], Tensor]:
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


def _vmap(head_: Head, memory: int = 1 << 28) -> Callable[[], Tensor]:
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


def uniform(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """One norm a sample under the uniform target; GradNorm's own norm is L1 and is checked as such."""
    head_ = Head(shape, dtype, device, seed)
    B, N, _ = shape
    h, z = head_.h, head_.z
    delta = z.double().softmax(-1) - 1 / N
    squared = delta.square().sum(-1) * head_.factor().squeeze(-1)
    absolute = delta.abs().sum(-1) * h.double().abs().sum(-1)
    found = _fastgrad(
        lambda impl: fastgrad.target_sqnorm(h, z, "uniform", impl=impl),
        lambda out: relative_error(out, squared),
        device,
    )
    found.append(
        Implementation(
            "torch.softmax", lambda: lambda: torch.softmax(z, -1),
            lambda out: scaled_error(out, z.double().softmax(-1)), 64 * torch.finfo(dtype).eps,
        )
    )  # fmt: skip
    tolerance = PEERS if dtype == torch.float32 else 0.1
    if B <= 64:
        found.append(
            Implementation(
                "GradNorm, as OpenOOD", lambda: _openood(head_),
                lambda out: relative_error(out, absolute), tolerance, graph=False,
            )
        )  # fmt: skip
    if B <= 256:
        found.append(
            Implementation(
                "GradNorm, pytorch-ood", lambda: _pytorch_ood(head_),
                lambda out: relative_error(-out, absolute), tolerance, graph=False,
            )
        )  # fmt: skip
    return found


def _openood(head_: Head) -> Callable[[], Tensor]:
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


def _pytorch_ood(head_: Head) -> Callable[[], Tensor]:
    from pytorch_ood.detector import GradNorm

    h = head_.h.float()
    layer = torch.nn.Linear(h.shape[1], head_.weight.shape[0], device=h.device)
    layer.load_state_dict({"weight": head_.weight.float(), "bias": head_.bias.float()})
    detector = GradNorm(layer, param_filter=lambda name: name == "weight").to(h.device)
    return lambda: detector.predict(h)


def head(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """The layer and all contrasts; norms are judged for the logits each implementation returned."""
    head_ = Head(shape, dtype, device, seed)
    h, weight, bias = head_.h, head_.weight, head_.bias
    product = F.linear(h.double(), weight.double(), bias.double())
    unit = 64 * torch.finfo(dtype).eps
    fits = {"logits": unit}

    def check(out: tuple[Tensor, Tensor]) -> float:
        logits, norms = out
        if scaled_error(logits, product) > fits["logits"]:
            return float("inf")
        return relative_error(norms, head_.norms(logits))

    def unfused(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, weight, bias)
        return z, textbook(h, z)

    found = _fastgrad(lambda impl: fastgrad.linear_contrast_sqnorm(h, weight, bias, impl=impl), check, device)
    found.append(
        Implementation(
            "linear alone", lambda: lambda: F.linear(h, weight, bias),
            lambda out: scaled_error(out, product), unit,
        )
    )  # fmt: skip
    found.append(
        Implementation("linear, softmax, closed form", lambda: lambda: unfused(h, weight, bias), check, PEERS)
    )
    found.append(
        Implementation("the same, torch.compile", lambda: _compiled(unfused, h, weight, bias), check, PEERS)
    )
    if device == "cuda":
        found += _neighbours(head_, product)
    return found


def _neighbours(head_: Head, product: Tensor) -> list[Implementation]:
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

    return [
        Implementation(
            "Liger fused linear loss", liger, lambda out: relative_error(out, losses.sum()), 0.05, graph=False
        ),
        Implementation("Cut Cross-Entropy", cut, lambda out: scaled_error(out, losses), 0.05, graph=False),
    ]


def statistics(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> list[Implementation]:
    """Minimum, maximum, mean, expectation and predicted contrast, without the matrix."""
    head_ = Head(shape, dtype, device, seed)
    h, weight, bias = head_.h, head_.weight, head_.bias
    z = F.linear(h.double(), weight.double(), bias.double())
    norms, p = head_.norms(z), z.softmax(-1)
    wanted = torch.stack(
        [
            norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1),
            norms.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1),
        ],
        -1,
    )  # fmt: skip
    # The norms follow the logits, whose products round by units of the dtype.
    tolerance = 64 * torch.finfo(dtype).eps * float(z.abs().max())

    def unfused(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.linear(h, weight, bias)
        norms, p = textbook(h, z), z.float().softmax(-1)
        top = norms.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
        return torch.stack([norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1), top], -1)

    def check(out: Any) -> float:
        return relative_error(torch.stack(list(out), -1) if isinstance(out, tuple) else out, wanted)

    found = _fastgrad(lambda impl: fastgrad.linear_contrast_stats(h, weight, bias, impl=impl), check, device)
    for item in found:
        item.tolerance = tolerance
    found.append(
        Implementation(
            "linear alone", lambda: lambda: F.linear(h, weight, bias),
            lambda out: scaled_error(out, z), 64 * torch.finfo(dtype).eps,
        )
    )  # fmt: skip
    found.append(
        Implementation(
            "linear, softmax, closed form", lambda: lambda: unfused(h, weight, bias), check,
            max(PEERS, tolerance),
        )
    )  # fmt: skip
    return found
