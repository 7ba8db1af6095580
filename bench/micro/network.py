"""The whole network: one squared gradient norm for every sample and parameter tensor.

Every implementation computes the same ``(B, P)`` matrix for the same loss and labels; the training step (one forward
and one full backward pass of the batch, without an optimizer) is the yardstick. Networks are in evaluation mode, where
samples do not mix; peers that insist on training mode get it where the network has nothing that depends on it.

A result is checked on the first and the last sample against a float64 backward pass of that sample alone, relative to
the norm itself, or to a millionth of a millionth of the sample's total where the true gradient is zero (the key's bias
of an attention, say). Allowed: 1e-4 for fastgrad, 1e-3 for the peers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgrad
from bench.harness import Case, Implementation, scaled_error
from bench.micro import models

OURS, PEERS = 1e-4, 1e-3


def bce_ones(logits: Tensor) -> Tensor:
    """Binary cross-entropy with the label 1 for every class, summed over samples and classes."""
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum")


def ce_predicted(logits: Tensor) -> Tensor:
    """Cross-entropy with the predicted class as label, summed over samples."""
    return F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")


SIGNALS = {"bce ones": bce_ones, "cross_entropy predicted": ce_predicted}


class Task:
    """A network, a batch and a loss; models and inputs are seeded."""

    def __init__(
        self, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], signal: str,
        device: str, seed: int, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.model = build().eval().to(device)
        made = torch.Generator().manual_seed(seed)
        x = inputs(made)
        self.dtype = dtype
        self.model.to(dtype)
        self.x = (x.to(dtype) if x.is_floating_point() else x).to(device)
        self.signal, self.loss = signal, SIGNALS[signal]
        self.wanted: dict[int, Tensor] = {}

    def double(self) -> tuple[nn.Module, Tensor]:
        """The network and the batch in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return copy.deepcopy(self.model).double(), x

    def error(self, norms: Tensor) -> float:
        """Relative error of ``(B, P)`` on the first and last sample."""
        if not self.wanted:
            model, x = self.double()
            for b in (0, len(x) - 1):
                grads = torch.autograd.grad(self.loss(model(x[b : b + 1])), list(model.parameters()))
                self.wanted[b] = torch.stack([g.square().sum() for g in grads])
        worst = max(_error(norms[b], wanted) for b, wanted in self.wanted.items())
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def bias_error(self, gradient: Tensor) -> float:
        """Error of the last bias's gradient for the whole batch, which needs only a float64 forward pass."""
        model, x = self.double()
        with torch.no_grad():
            z = model(x)
        z.requires_grad_()
        (delta,) = torch.autograd.grad(self.loss(z), z)
        return scaled_error(gradient, delta.sum(0))


def _error(found: Tensor, wanted: Tensor) -> float:
    floor = 1e-12 * wanted.sum()
    return float(((found.double() - wanted).abs() / (wanted + floor)).max())


def _case(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], signal: str,
    device: str, seed: int, batch: int, skip: tuple[str, ...] = (), dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    def implementations() -> list[Implementation]:
        task = Task(build, inputs, signal, device, seed, dtype)
        return [item for item in _implementations(task) if item.name not in skip]

    suffix = "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
    return Case(f"{name} B={batch} {signal}{suffix}", implementations, "training step")


def _images(batch: int, size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda made: torch.randn(batch, 3, size, size, generator=made)


def _tokens(batch: int, length: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    return lambda made: torch.randint(vocabulary, (batch, length), generator=made)


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    case = partial(_case, device=device, seed=seed)
    if size == "tiny":
        yield case("plain CNN 8x8", partial(models.plain, width=4), _images(3, 8), "bce ones", batch=3)
        small = partial(models.GPT, vocabulary=16, length=6, width=8, depth=1, heads=2)
        yield case("GPT T=6", small, _tokens(2, 6, 16), "cross_entropy predicted", batch=2)
        yield contrast_case(
            "plain CNN 8x8", partial(models.plain, classes=3, width=4), _images(2, 8), device, seed, 2
        )
        return
    if size == "quick":
        yield case("plain CNN 32x32", models.plain, _images(64, 32), "bce ones", batch=64)
        yield case("ResNet-18 32x32", models.resnet, _images(16, 32), "bce ones", batch=16)
        return
    if device == "cuda":
        yield from gpu_cases(device, seed)
        return
    yield case("plain CNN 32x32", models.plain, _images(64, 32), "bce ones", batch=64)
    yield case("ResNet-18 32x32", models.resnet, _images(64, 32), "bce ones", batch=64)
    yield case("ResNet-18 32x32", models.resnet, _images(8, 32), "cross_entropy predicted", batch=8)
    grouped = partial(models.resnet, norm=nn.GroupNorm)
    yield case("ResNet-18 group norm 32x32", grouped, _images(16, 32), "bce ones", batch=16)
    yield case(
        "ResNet-50 64x64", partial(models.resnet, 50, 100, small=False), _images(16, 64), "bce ones", batch=16
    )
    yield case("DenseNet-121 64x64", models.densenet, _images(8, 64), "bce ones", batch=8)
    yield case("ViT-B/16 64x64", partial(models.ViT, 100, 64), _images(8, 64), "bce ones", batch=8)
    yield case("GPT T=128", models.GPT, _tokens(16, 128, 8192), "cross_entropy predicted", batch=16)
    yield contrast_case("ResNet-18 32x32", models.resnet, _images(8, 32), device, seed, 8)


def gpu_cases(device: str = "cuda", seed: int = 0, tiny: bool = False) -> Iterator[Case]:
    """Whole networks at training batch sizes."""
    if tiny:
        small = partial(models.plain, classes=2, width=4)
        yield contrast_case("plain CNN 8x8", small, _images(2, 8), device, seed, 2)
        return
    case = partial(_case, device=device, seed=seed)
    slow = ("per-sample loop", "vmap(grad)")
    images = _images(512, 32)
    yield case("ResNet-18 32x32", models.resnet, images, "bce ones", batch=512, skip=slow)
    yield case("ViT-B/16 224x224", models.ViT, _images(128, 224), "bce ones", batch=128, skip=slow)
    yield case("ResNet-18 32x32", models.resnet, _images(64, 32), "bce ones", batch=64)
    yield case(
        "ViT-B/16 224x224",
        models.ViT,
        _images(128, 224),
        "bce ones",
        batch=128,
        skip=slow,
        dtype=torch.bfloat16,
    )
    yield case("plain CNN 32x32", models.plain, images, "bce ones", batch=512, skip=slow)
    large = partial(models.resnet, 50, 1000, small=False)
    yield case("ResNet-50 224x224", large, _images(64, 224), "bce ones", batch=64, skip=slow)
    yield case(
        "GPT T=128", models.GPT, _tokens(256, 128, 8192), "cross_entropy predicted", batch=256, skip=slow
    )
    yield contrast_case("ResNet-18 32x32", models.resnet, _images(16, 32), device, seed, 16)


def _implementations(task: Task) -> list[Implementation]:
    extractor = ("bce", "ones") if task.signal == "bce ones" else ("cross_entropy", "predicted")
    half = task.dtype != torch.float32
    ours, peers = (0.1, 0.5) if half else (OURS, PEERS)

    def fast() -> Callable[[], Tensor]:
        features = fastgrad.GradientFeatures(task.model, loss=extractor[0], target=extractor[1])
        return lambda: features(task.x)[1]

    unit = 256 * torch.finfo(task.dtype).eps
    return [
        Implementation("fastgrad", fast, task.error, ours, graph=False),
        Implementation("training step", lambda: _step(task), task.bias_error, unit, graph=False),
        Implementation("forward", lambda: _forward(task), lambda out: _forward_error(task, out), unit, graph=False),
        Implementation("BackPACK BatchL2Grad", lambda: _backpack(task), task.error, peers, graph=False),
        Implementation("Opacus ghost norms", lambda: _opacus(task), task.error, peers, graph=False),
        Implementation("vmap(grad)", lambda: _vmap(task), task.error, peers, graph=False),
        Implementation("per-sample loop", lambda: _loop(task), task.error, peers, graph=False),
    ]  # fmt: skip


def _step(task: Task) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        return torch.autograd.grad(task.loss(task.model(task.x)), parameters)[-1]

    return call


def _forward(task: Task) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = task.model(task.x)
        return out

    return call


def _forward_error(task: Task, out: Tensor) -> float:
    model, x = task.double()
    with torch.no_grad():
        return scaled_error(out, model(x))


def _backpack(task: Task) -> Callable[[], Tensor]:
    """As in BackPACK's documentation: extend the model and the loss, backward inside the context."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(task.model))
    if task.signal == "bce ones":
        loss_function = extend(nn.BCEWithLogitsLoss(reduction="sum"))
    else:
        loss_function = extend(nn.CrossEntropyLoss(reduction="sum"))

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(task.x)
        labels = torch.ones_like(logits) if task.signal == "bce ones" else logits.detach().argmax(-1)
        with backpack(BatchL2Grad()):
            loss_function(logits, labels).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()], -1)

    return call


def _opacus(task: Task) -> Callable[[], Tensor]:
    """Opacus's ghost clipping up to the norms; its hooks work in training mode, so networks with batch norm fail."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
        raise ValueError("Opacus refuses batch norm")
    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.model).train(), loss_reduction="sum", use_ghost_clipping=True
    )

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        task.loss(model(task.x)).backward()
        return torch.stack([p._norm_sample for p in model.trainable_parameters], -1).square()

    return call


def _vmap(task: Task, memory: int = 1 << 30) -> Callable[[], Tensor]:
    """PyTorch's tutorial on per-sample gradients, in chunks that keep the gradients within ``memory`` bytes."""
    from torch.func import functional_call, grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = dict(task.model.named_parameters())
    buffers = dict(task.model.named_buffers())
    detached = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(task.model, (parameters, buffers), (sample.unsqueeze(0),))
        return task.loss(logits)

    size = sum(p.numel() * p.element_size() for p in detached.values())
    chunk = max(1, min(len(task.x), memory // size))

    def norms(sample: Tensor) -> Tensor:
        grads = grad(loss)(detached, sample)
        return torch.stack([g.square().sum() for g in grads.values()])

    batched = vmap(norms, randomness="different", chunk_size=chunk)

    def call() -> Tensor:
        # The fused attention of a CPU has no batching rule and would run sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            return batched(task.x)

    return call


def _loop(task: Task) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        rows = []
        for sample in task.x:
            grads = torch.autograd.grad(task.loss(task.model(sample.unsqueeze(0))), parameters)
            rows.append(torch.stack([g.square().sum() for g in grads]))
        return torch.stack(rows)

    return call


def contrast_case(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], device: str, seed: int,
    batch: int,
) -> Case:  # fmt: skip
    """All N contrasts through the whole network, ``(B, N, P)``, with cross-entropy."""

    def implementations() -> list[Implementation]:
        task = Task(build, inputs, "bce ones", device, seed)
        classes = int(_forward(task)().shape[1])

        def check(norms: Tensor) -> float:
            model, x = task.double()
            worst = 0.0
            for b in (0, len(x) - 1):
                for k in (0, classes - 1):
                    loss = F.cross_entropy(model(x[b : b + 1]), torch.tensor([k], device=x.device))
                    grads = torch.autograd.grad(loss, list(model.parameters()))
                    worst = max(worst, _error(norms[b, k], torch.stack([g.square().sum() for g in grads])))
            return worst

        def fast() -> Callable[[], Tensor]:
            features = fastgrad.GradientFeatures(task.model, loss="cross_entropy", target="contrast")
            return lambda: features(task.x)[1]

        def looped(make: Callable[[Task], Callable[[], Tensor]]) -> Callable[[], Tensor]:
            calls = []
            for k in range(classes):
                one = copy.copy(task)
                one.loss = partial(_against, k=k)
                calls.append(make(one))
            return lambda: torch.stack([call() for call in calls], 1)

        return [
            Implementation("fastgrad", fast, check, OURS, graph=False),
            Implementation(
                "training step", lambda: _step(task), task.bias_error, 256 * 2.0**-23, graph=False
            ),
            Implementation("vmap(grad)", lambda: looped(_vmap), check, PEERS, graph=False),
            Implementation("per-sample loop", lambda: looped(_loop), check, PEERS, graph=False),
        ]

    return Case(f"{name} B={batch} all contrasts", implementations, "training step")


def _against(logits: Tensor, k: int) -> Tensor:
    labels = torch.full(logits.shape[:1], k, device=logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


__all__ = ["SIGNALS", "Task", "cases", "contrast_case"]
