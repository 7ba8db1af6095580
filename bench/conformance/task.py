"""A model, a batch, a loss for each sample, and the float64 loop over samples that every tool is compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import fastgrad
from bench.conformance.models import MODELS
from bench.registry import SEED
from fastgrad.gradients.project import Places


class Task:
    """A model in evaluation mode with random weights, and a batch of inputs: a tensor, or tensors by argument."""

    def __init__(self, name: str, batch: int) -> None:
        build, inputs = MODELS[name]
        torch.manual_seed(SEED)
        self.model = build().eval().requires_grad_()
        self.x = inputs(batch)
        self.batch = batch
        with torch.no_grad():
            for p in self.model.parameters():
                if bool((p == p.flatten()[:1]).all()):  # zeros and ones, behind which gradients could vanish
                    p += 0.1 * torch.randn_like(p)
            for module in self.model.modules():
                if isinstance(module, _NormBase) and module.running_var is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)

    def to(self, dtype: torch.dtype) -> Task:
        one = copy.copy(self)
        one.model = copy.deepcopy(self.model).to(dtype)
        one.x = each(self.x, lambda value: value.to(dtype) if value.is_floating_point() else value)
        return one

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def call(self, model: Any, x: Any) -> Tensor:
        """Return the losses of the samples."""
        return losses(model(**x) if isinstance(x, Mapping) else model(x))

    def losses(self, model: Any = None) -> Tensor:
        return self.call(self.model if model is None else model, self.x)

    def row(self, i: int) -> Any:
        return each(self.x, lambda value: value[i : i + 1])


def each(x: Any, function: Any) -> Any:
    return {key: function(value) for key, value in x.items()} if isinstance(x, Mapping) else function(x)


def losses(output: Any) -> Tensor:
    """Return a cross-entropy ``(B,)``: of class ``t mod N`` at position t, and the mean over positions."""
    if not isinstance(output, Tensor):
        output = next(v for key in ("logits", "last_hidden_state") if (v := getattr(output, key, None)) is not None)
    z = output.log_softmax(-1).flatten(1, -2) if output.dim() > 2 else output.log_softmax(-1)[:, None]
    label = torch.arange(z.shape[1]) % z.shape[2]
    return -z.gather(2, label[None, :, None].expand(len(z), -1, 1)).mean((1, 2))


class Loop:
    """Gradients of single samples by ``torch.autograd.grad`` in float64, ``(B, numel)`` for each parameter by name."""

    def __init__(self, task: Task) -> None:
        double = task.to(torch.float64)
        _in_order(double.model)
        named = double.parameters
        rows = [self._of(double.call(double.model, double.row(i)).sum(), named) for i in range(task.batch)]
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.gradients = {name: torch.stack(one) for name, one in zip(named, zip(*rows, strict=True), strict=True)}
        # The loop is checked as well: its sum must be the gradient of the batch.
        total = self._of(double.losses().sum(), named)
        scale = sum(float(t.square().sum()) for t in total) ** 0.5
        off = max(float((g.sum(0) - t).norm()) for g, t in zip(self.gradients.values(), total, strict=True)) / scale
        if off > 1e-7:  # some models compute norms in float32
            raise ValueError(f"gradients of samples must add up to that of the batch; they differed by {off:.1e}")

    @staticmethod
    def _of(loss: Tensor, named: Mapping[str, Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        return [g.flatten() for g in found]

    @cached_property
    def sqnorms(self) -> dict[str, Tensor]:
        return {name: g.square().sum(1) for name, g in self.gradients.items()}

    @property
    def used(self) -> set[str]:
        """Parameters that the losses depend on."""
        return {name for name, value in self.sqnorms.items() if bool((value > 0).any())}

    def norm_error(self, found: Mapping[str, Tensor]) -> float:
        """Return the largest error relative to the squared norm plus 1e-12 of the sample's sum."""
        total = torch.stack(list(self.sqnorms.values())).sum(0)
        return max(
            worst((value.double() - self.sqnorms[name]).abs() / (self.sqnorms[name] + 1e-12 * total))
            for name, value in found.items()
        )

    def gram_error(self, found: Tensor, names: set[str]) -> float:
        """Return the largest error relative to the product of two norms, for the gradients of these parameters."""
        exact = torch.stack([self.gradients[name] @ self.gradients[name].mT for name in sorted(names)]).sum(0)
        norms = exact.diagonal().sqrt()
        return worst((found.double() - exact).abs() / (norms[:, None] * norms))

    def total_error(self, found: Tensor, names: set[str]) -> float:
        """Return the largest relative error of squared norms over all these parameters together."""
        exact = torch.stack([self.sqnorms[name] for name in sorted(names)]).sum(0)
        return worst((found.double() - exact).abs() / exact)

    def projection_error(self, found: Tensor, seed: int = 0) -> float:
        """Return the largest error of `grad_project`'s rows relative to the norm: its map, number by number."""
        size, expected = found.shape[1], torch.zeros(found.shape, dtype=torch.float64)
        for name, g in self.gradients.items():
            places = Places.of(f"{seed} {name} {self.shapes[name]}", self.shapes[name], size, found.device)
            at = ((places.row[:, None] + places.column) % size).flatten()
            sign = (places.row_sign[:, None] * places.column_sign).flatten()
            expected.index_add_(1, at, g * sign)
        norms = torch.stack(list(self.sqnorms.values())).sum(0).sqrt()
        return worst((found.double() - expected).abs() / norms[:, None])


def worst(errors: Tensor) -> float:
    return float(errors.max()) if bool(errors.isfinite().all()) else float("inf")


def _in_order(model: nn.Module) -> None:
    """Give normalisations inputs and gradients in memory's usual order.

    PyTorch's backward pass of batch norm is wrong for a single image whose gradient lies in another (2.13, CPU).
    """
    for module in model.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm)):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
            module.register_forward_hook(lambda _, args, out: _ordered(out))


def _ordered(out: Tensor) -> Tensor:
    out = out.clone()
    out.register_hook(lambda gradient: gradient.contiguous())
    return out


def rows_of(task: Task, size: int) -> Tensor:
    """Return `grad_project`'s rows."""
    with fastgrad.record(task.model):
        return fastgrad.grad_project(task.losses(), task.model, size)
