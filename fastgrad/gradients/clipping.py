"""``clip_gradients``: clip every sample's gradient (Abadi et al., 2016) without storing any of them.

The norms come from one backward pass. A second one, of the losses times ``min(1, max_norm / norm)``, sums the clipped
gradients (Li et al., 2022, arXiv:2110.05679).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import outside_of_compilation
from fastgrad.engine.inputs import BatchDims
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.sharded import is_sharded, named_parameters
from fastgrad.gradients.recorder import record, recorded_sqnorms
from fastgrad.gradients.separate import UNITS, Outputs, outputs_of, require_own_parameters, require_separate


class clip_gradients(record):  # noqa: N801 - reads as a statement: ``with clip_gradients(model, 1.0):``
    """Context of a training step that clips gradients sample by sample (Abadi et al., 2016).

    Inside, call ``model`` once, compute one loss per sample and call `backward`, which adds the sum of the samples'
    clipped gradients to ``.grad``. Micro-batches accumulate: each is one more call of the model and of `backward`.
    Noise and privacy accounting are left to others; Opacus' optimizers accept this ``.grad``.

    Modules keep their mode: with dropout, norms and gradients have the same mask. Frozen parameters are left out of
    norms and gradients. ``DistributedDataParallel`` and FSDP average over ranks, as always. The limit holds up to
    rounding: compute the losses in float32 where the model runs in half precision.

    Args:
        model: The model to be called inside, with the same conditions as for `record`.
        max_norm: The largest L2 norm that a sample's gradient keeps, over all trainable parameters together. A mapping
            from names of parameters or modules to norms clips groups separately. A parameter belongs to the longest
            name that is a prefix of its own. Each group costs a backward pass.
        batch_dims: As in `record`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a norm is not positive and finite, a group has no trainable parameter or a trainable parameter
            has no group. Also for ``DistributedDataParallel`` with ``static_graph=True``, and for a model that `record`
            refuses, such as batch norm in training mode. There, one sample changes the gradients of all others.
        RuntimeError: At the end, if the losses of the latest call did not go back by `backward`.

    Example::

        with fastgrad.clip_gradients(model, max_norm=1.0) as clipped:
            losses = F.cross_entropy(model(x), y, reduction="none")
            norms = clipped.backward(losses)
        optimizer.step()
    """

    def __init__(
        self, model: nn.Module, max_norm: float | Mapping[str, float], *, batch_dims: BatchDims = None
    ) -> None:
        super().__init__(model, batch_dims=batch_dims)
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
            raise ValueError(
                "model must not be DistributedDataParallel with static_graph=True: it averages in the first backward "
                "pass alone, before gradients are clipped"
            )
        self._joint = not isinstance(max_norm, Mapping)
        self._limits = dict(max_norm) if isinstance(max_norm, Mapping) else {"": max_norm}
        for name, limit in self._limits.items():
            subject = "max_norm" if self._joint else f"max_norm[{name!r}]"
            if not isinstance(name, str):
                raise TypeError(f"max_norm must name parameters or modules; one name was {name!r}")
            checks.lies_in("(0, inf)", **{subject: limit})
        _groups(self.model, self._limits)
        #: The outputs of the latest call, and where the batch is in each.
        self._outputs: Outputs = []
        self._count = self._samples = 0
        self._foreign = self._refused = False

    def __reduce__(self) -> tuple[Any, ...]:
        again, (kind, model, options) = super().__reduce__()
        return again, (kind, model, options | {"max_norm": self._limits[""] if self._joint else self._limits})

    def _note(self, output: Any, recorded: Recorded) -> None:
        """Keep the outputs, from which the losses will be computed."""
        super()._note(output, recorded)
        self._outputs = outputs_of(output, recorded)
        self._count += 1
        self._samples, self._foreign = recorded.samples, recorded.custom_backward

    def _forget(self) -> None:
        """Begin a new step."""
        self._outputs, self._count, self._refused = [], 0, False

    def __exit__(self, *error: object) -> None:
        unclipped = self._count and not self._refused and error[:1] == (None,)
        self._forget()
        super().__exit__(*error)
        if unclipped:
            raise RuntimeError(
                "losses must go back by the backward of clip_gradients before it ends; those of the latest call did "
                "not, and a plain backward clips nothing. Call the model under no_grad if nothing goes back"
            )

    def backward(self, losses: Tensor) -> Tensor:
        """Add the clipped gradients to ``.grad`` of the trainable parameters.

        Args:
            losses: ``(B,)``, one per sample (``reduction="none"``), each computed from that sample's row of the output
                of the one call since the last `backward`. A factor on all losses, such as 1/B or a loss scale,
                also scales the norms.

        Returns:
            The norms before clipping, ``(B,)``, or ``(B, G)`` for G groups, in the order of ``max_norm``; float32
            (float64 for a float64 model). A norm whose square is beyond the dtype's range is 0 (its sample is not
            clipped) or infinite (its sample adds nothing).

        Raises:
            TypeError: If ``losses`` is no floating-point tensor.
            ValueError: If ``losses`` is not ``(B,)``, mixes samples, or depends on parameters other than through the
                model's output, as a weight decay does. Also if a trainable parameter has a hook
                (``Tensor.register_hook``), which changes gradients after they are clipped.
            RuntimeError: If the model was not called exactly once, with gradients, since the last `backward`.
        """
        try:
            norms = outside_of_compilation(self._backward)(losses)
        except (TypeError, ValueError):
            # Other losses of the same call may be accepted, so it is kept.
            self._refused = True
            raise
        except BaseException:
            self._forget()
            raise
        self._forget()
        return norms

    def _backward(self, losses: Tensor) -> Tensor:
        checks.is_float("losses", losses)
        if self._count != 1:
            raise RuntimeError(
                "model must be called once, inside clip_gradients and with gradients enabled, before each backward; "
                f"it had been called {self._count} times"
            )
        checks.shape_is("losses", losses, (self._samples,), 'one loss a sample, as with reduction="none"')
        if self._samples:
            require_own_parameters(self.model, losses, self._outputs)
            require_separate(losses, self._outputs)
        # Parameters may have been frozen, released or replaced since the last step.
        groups = _groups(self.model, self._limits)
        parameters = [p for group in groups for p in group]
        for name, p in named_parameters(self.model).items():
            if p.requires_grad and p._backward_hooks:
                raise ValueError(
                    f"model must have no hooks on its parameters (Tensor.register_hook): {name!r} had one, which would "
                    "change a gradient after it is clipped. Remove it, or change .grad after backward"
                )
        sqnorms = recorded_sqnorms(self, [losses], parameters, [torch.ones_like(losses)], False, True)
        if self._foreign:
            twice = recorded_sqnorms(self, [losses], parameters, [2 * torch.ones_like(losses)], False, True)
            self._require_proportion(sqnorms, twice)
        sqnorm_of = dict(zip(parameters, sqnorms, strict=True))
        columns = [torch.stack([sqnorm_of[p].to(losses.device) for p in group]).sum(0).sqrt() for group in groups]
        for group, limit, norms in zip(groups, self._limits.values(), columns, strict=True):
            factors = (limit / norms).clamp(max=1).to(losses.dtype)
            again = norms is not columns[-1]
            if not losses.requires_grad:  # the batch is empty, and only frozen parameters are used
                continue
            if self._samples or is_sharded(self.model):
                torch.autograd.backward([losses], [factors], retain_graph=again, inputs=group)
                continue
            # An empty batch adds zeros; PyTorch's own backward pass of recurrent layers would add NaN.
            found = torch.autograd.grad([losses], group, [factors], retain_graph=again, allow_unused=True)
            for p, gradient in zip(group, found, strict=True):
                if gradient is not None and p.grad is None:
                    p.grad = torch.zeros_like(p)
        return columns[0] if self._joint else torch.stack(columns, 1)

    @staticmethod
    def _require_proportion(sqnorms: Sequence[Tensor], twice: Sequence[Tensor]) -> None:
        """Raise ValueError unless the norms of twice the losses are twice as large."""
        for plain, doubled in zip(sqnorms, twice, strict=True):
            allowed = UNITS * torch.finfo(plain.dtype).eps * plain
            if bool(((doubled / 4 - plain).abs() > allowed).any()):
                raise ValueError(
                    "model must have gradients in proportion to its losses, so that factors on these clip them; they "
                    "were not, for example because a hook or a custom function clamps them"
                )


def _groups(model: nn.Module, limits: Mapping[str, float]) -> list[list[Tensor]]:
    """Return the trainable parameters under each name, in the order of ``limits``."""
    groups: dict[str, list[Tensor]] = {name: [] for name in limits}
    for name, p in named_parameters(model).items():
        if not p.requires_grad:
            continue
        prefixes = [key for key in limits if key in ("", name) or name.startswith(key + ".")]
        if not prefixes:
            raise ValueError(f"max_norm must cover every trainable parameter; it had nothing for {name!r}")
        groups[max(prefixes, key=len)].append(p)
    for name, group in groups.items():
        if not group:
            if not name:
                raise ValueError("model must have parameters that require gradients; it had none")
            raise ValueError(f"max_norm must name parameters or modules that are trained; {name!r} had none of its own")
    return list(groups.values())
