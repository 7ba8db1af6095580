"""The exact general fallback: per-sample gradients of one module alone, a few samples at a time.

It serves layers without a rule, and parameters that a module holds directly or that are used more than once: all uses
lie within the module that is computed again, so their gradients add up before the norm is taken.

A model that reorders samples or looks at values may give a sample alone other gradients than in its batch. Such models
are checked: the samples' gradients, summed with fixed weights, must equal the gradient of the batch for output
gradients with these weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgrad._torch import disable_mha_fastpath, is_readable, own_parametrizations, pytree, vmap
from fastgrad.engine.copy import Settings, Shadow, detach_plain
from fastgrad.engine.objects import objects_kept
from fastgrad.engine.run import RecomputedSite, Replay, Run
from fastgrad.engine.state import ReadOnly, apart
from fastgrad.engine.tracing import is_fixed, is_symbolic
from fastgrad.layers.reduce import leaf, sqnorm, upcast

#: Bytes of per-sample gradients held at once.
CHUNK_BYTES = 64 * 2**20

_EMBEDDING = inspect.signature(torch.nn.functional.embedding)

#: ``(parameters, inputs that carry the batch) -> outputs``.
Forward = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def floating(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among a module's outputs, in order."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def batch_first(outputs: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Return the outputs with these dimensions moved to the front."""
    # In training mode a module may have fewer outputs than it was planned with, or more.
    every = (*places, *[0] * len(outputs))
    return [out.movedim(place, 0) if place else out for out, place in zip(outputs, every, strict=False)]


@dataclass(frozen=True)
class FallbackSite(RecomputedSite):
    """A module of any kind, computed again sample by sample."""

    batched: tuple[bool, ...]  # for each leaf of the inputs, whether its dimension 0 is the batch, or a multiple of it
    places: tuple[int, ...]  # the batch dimension of each output; dimension 0 may be a multiple of the batch
    vectorize: bool  # whether samples of a chunk run together under ``vmap``, which cannot take all modules
    # Whether to compare the gradients with those of the whole batch even if each sample alone has the same outputs.
    verify: bool
    precision: float  # the relative rounding error of the coarsest numbers that the module computes

    def _replay(self, run: Run, shadow: Shadow, outputs: list[Tensor], settings: Settings) -> Replay:
        again, device = _Again(self, shadow, outputs, settings), outputs[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def replay(args: Any, kwargs: Any, gradients: Sequence[Tensor]) -> Tensor:
            fixed_before = is_fixed(run.samples)
            # A graph for any batch size has no loop over samples.
            mapped = self.vectorize or not is_symbolic(run.samples)
            with objects_kept(again.module), torch.autocast(device, dtype, enabled, cache_enabled=False):
                gradients = batch_first(gradients, self.places)
                norms = again.sqnorms(args, kwargs, gradients, run.samples, self.verify) if mapped else None
            if norms is None or (is_fixed(run.samples) and not fixed_before):
                raise RuntimeError(
                    f"layer {self.path!r} ({type(again.module).__name__}) has no rule of its own and is run again for "
                    "each sample, in operations whose computation depends on the batch size, so its gradients have no "
                    "graph of dynamic batch. Register a rule (fastgrad.layers.register_rule) or leave out what reads "
                    "its gradients; a .pt2 can be exported with one_by_one=True"
                )
            return norms

        return replay


class _Again:
    """One call of a fallback's module, with its ``outputs`` and the ``settings`` before it."""

    def __init__(self, site: FallbackSite, shadow: Shadow, outputs: Sequence[Tensor], settings: Settings) -> None:
        self.site, self.settings, self.outputs = site, settings, batch_first(outputs, site.places)
        # The user's module rather than its copy, whose hooks belong to this forward pass.
        self.module = shadow.model.get_submodule(site.path)
        self.parameters = [shadow.model.get_parameter(name) for name in site.parameters]
        self.recorded, self.next_hook = shadow.recorded, shadow.next_hook
        self.read_only = ReadOnly(self.module)

    def sqnorms(self, args: Any, kwargs: Any, gradients: list[Tensor], samples: int, verify: bool) -> Tensor:
        """Return squared norms ``(B, P)``; ValueError if a sample alone has other gradients than in its batch."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [value for value, is_batched in zip(leaves, self.site.batched, strict=True) if is_batched]

        def forward(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
            carried = iter(tensors)
            filled = [
                next(carried) if is_batched else value if isinstance(value, Tensor) else apart(value, Tensor.clone)
                for value, is_batched in zip(leaves, self.site.batched, strict=True)
            ]
            return self._forward(values, *pytree.tree_unflatten(filled, spec))

        readable = is_readable(*gradients, *self.outputs)
        verify = verify and readable
        rows, same = [], True
        weighted = [torch.zeros_like(p) for p in self.parameters] if verify else []
        split_inputs, split_gradients, split_outputs = (
            [t.unflatten(0, (samples, -1)) for t in tensors] for tensors in (inputs, gradients, self.outputs)
        )
        chunk = max(1, CHUNK_BYTES // max(1, sum(p.numel() * p.element_size() for p in self.parameters)))
        chunk = chunk if self.site.vectorize else 1
        # A symbolic batch, in a graph being traced, stays in one piece.
        parts = [slice(None)] if is_symbolic(samples) else [slice(i, i + chunk) for i in range(0, samples, chunk)]
        with torch.enable_grad():
            for part in parts:
                again, grads = self._each(forward, [t[part] for t in split_inputs], [g[part] for g in split_gradients])
                same = same and all(map(agree, again, [out[part] for out in split_outputs]))
                rows.append(torch.stack([sqnorm(f) for f in upcast(*grads)], 1))
                if verify:
                    weights = _weights(samples, grads[0].device)[part]
                    weighted = [
                        total + torch.tensordot(weights.to(each.dtype), each.detach(), 1)
                        for total, each in zip(weighted, grads, strict=True)
                    ]
            norms = rows[0] if len(rows) == 1 else torch.cat(rows)
            if verify:
                self._compare(forward, inputs, gradients, weighted, norms)
            elif not same:
                if not readable:
                    raise self._refusal("gives other outputs for a sample alone than for the batch")
                return self.sqnorms(args, kwargs, gradients, samples, True)
        return norms

    def _forward(self, values: Sequence[Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        """Return the module's outputs, batch first, for these values of the parameters."""
        value_of = {id(p): v for p, v in zip(self.parameters, values, strict=True)}
        shadow = Shadow(
            self.module, lambda p: value_of.get(id(p), detach_plain(p)),
            training=self.recorded, recorded=self.recorded,
        )  # fmt: skip
        shadow.restore(self.settings, self.next_hook)
        for copy in shadow.modules.values():
            if copy.training:
                # A sample alone may take another branch than the batch, one that writes to buffers.
                copy._buffers = {name: b if b is None else b.clone() for name, b in copy._buffers.items()}
            else:
                disable_mha_fastpath(copy)
        # Without the module's hooks: the inputs were saved after its pre-hooks, the outputs before its hooks.
        with own_parametrizations(), self.read_only:
            return batch_first(floating(shadow.root.forward(*args, **kwargs)), self.site.places)

    def _each(
        self, forward: Forward, inputs: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return outputs and gradients of each sample of a chunk, ``(B, *shape)``."""
        if not self.site.vectorize:
            wanted = [leaf(detach_plain(p)) for p in self.parameters]
            alone = [out.unsqueeze(0) for out in forward(wanted, [t[0] for t in inputs])]
            self._require_shapes(alone, gradients)
            outputs, grads = _differentiated(alone, wanted, gradients)
            return outputs, [f.unsqueeze(0) for f in grads]
        count = gradients[0].shape[0]
        wanted = [leaf(detach_plain(p).unsqueeze(0).expand(count, *p.shape)) for p in self.parameters]
        with _PaddedRows():
            outputs = vmap(forward)(wanted, inputs)
        self._require_shapes(outputs, gradients)
        return _differentiated(outputs, wanted, gradients)

    def _require_shapes(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Raise ValueError if outputs of samples alone have other shapes than the gradients that are sent back."""
        sent = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
        if any(out.shape[1:] != g.shape[1:] for out, g in sent):
            raise self._refusal(
                "gives outputs of another shape for a sample alone than for the batch, as with squeeze() or with an "
                "attribute that has a row for each sample"
            )

    def _compare(
        self, forward: Forward, inputs: list[Tensor], gradients: list[Tensor], weighted: list[Tensor], norms: Tensor
    ) -> None:
        """Raise ValueError unless the ``weighted`` sums of the samples' gradients equal the batch's gradients."""
        wanted, weights = [leaf(detach_plain(p)) for p in self.parameters], _weights(len(norms), norms.device)
        at = [
            g * weights.repeat_interleave(g.shape[0] // len(weights)).reshape(-1, *[1] * (g.dim() - 1)).to(g)
            for g in gradients
        ]
        again, grads = _differentiated(forward(wanted, inputs), wanted, at)
        precision = max(self.site.precision, *(torch.finfo(t.dtype).eps for t in (*self.outputs, *grads)))
        if not all(agree(one, other, precision) for one, other in zip(again, self.outputs, strict=True)):
            raise self._refusal(
                "gives other outputs when it is computed again, as with random numbers; give it these as an input"
            )
        # In the dtype of the norms, because squares of float64 gradients may be out of float32's range.
        scales = (weights.to(norms).square() @ norms).sqrt()
        floor = 1e3 * precision * scales.max()
        for scale, one, other in zip(scales, weighted, grads, strict=True):
            if not (one - other).norm() <= math.sqrt(precision) * scale + floor:
                raise self._refusal("gives other gradients for a sample alone than for the batch")

    def _refusal(self, what: str) -> ValueError:
        name = self.site.path or type(self.module).__name__
        return ValueError(
            f"model must treat the samples of a batch independently and alike each time; its module {name!r} {what}"
        )


def dense_grads(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], gradients: Sequence[Tensor], *, keep: bool = False
) -> list[Tensor | None]:
    """Return the gradient of each of ``wanted`` for ``gradients`` sent back from the outputs that have a graph."""
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    reached, at = zip(*pairs, strict=True)
    found = torch.autograd.grad(reached, wanted, at, allow_unused=True, retain_graph=keep)
    # Embeddings may have sparse gradients. Dense ones are left alone, because vmap has no rule for to_dense.
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def _differentiated(
    outputs: list[Tensor], wanted: list[Tensor], gradients: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs without their graph, and the gradients of ``wanted``."""
    found = zip(dense_grads(outputs, wanted, gradients), wanted, strict=True)
    return [out.detach() for out in outputs], [torch.zeros_like(w) if g is None else g for g, w in found]


def _weights(samples: int, device: torch.device) -> Tensor:
    """Return fixed weights of samples, no two alike."""
    return 1.5 + torch.cos(1.7 * torch.arange(samples, device=device))


def agree(again: Tensor, output: Tensor, precision: float = 0.0) -> bool:
    """Whether two computations of one output agree in half the digits of its dtype, or of ``precision`` if coarser."""
    if not is_readable(again, output) or again.numel() == 0:
        return True
    tolerance = math.sqrt(max(precision, torch.finfo(output.dtype).eps))
    again, output = (t.double().nan_to_num() for t in (again, output.reshape(again.shape)))
    return bool((again - output).abs().max() <= tolerance * output.abs().max())


class _PaddedRows(TorchFunctionMode):
    """Keeps gradients from the padding row of embeddings, which PyTorch does for one sample only under ``vmap``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        call = _EMBEDDING.bind(*args, **(kwargs or {}))
        row = call.arguments.get("padding_idx")
        if row is None:
            return func(*call.args, **call.kwargs)
        call.arguments["padding_idx"] = None
        rows = func(*call.args, **call.kwargs)
        padded = call.arguments["input"] == row % call.arguments["weight"].shape[0]
        return torch.where(padded.unsqueeze(-1), rows.detach(), rows)
