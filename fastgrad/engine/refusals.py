"""Models that are refused before any work: their gradients are not whole, or their samples depend on each other."""

from __future__ import annotations

import torch
from torch import nn

from fastgrad import checks
from fastgrad._torch import BatchNorm

#: Names of the classes that hold a part of a parameter, or of several.
_PARTS = frozenset({"DTensor", "FullyShardedDataParallel", "ShardedTensor"})


def refuse_scripted(model: nn.Module) -> None:
    """Raise TypeError for a scripted or traced module, which has no copy in Python."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be made of ordinary modules; {name or 'it'!r} was a {type(module).__name__} (torch.jit). "
                "Use the module that it was made of"
            )


def refuse_devices(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters hold no values, or lie where nothing can be float64."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model must hold values; its parameter {name!r} was on the meta device")
        checks.has_float64(f"parameter {name!r} of model", parameter)


def refuse_parts(model: nn.Module) -> None:
    """Raise for a model that has no squared norm of each parameter here.

    Raises:
        TypeError: If a parameter is one part of several, as under FSDP or tensor parallelism, of which one process
            alone knows no norm, or complex, or if a module was scripted or traced.
        ValueError: If a parameter holds no values, or its device has no float64.
    """
    refuse_scripted(model)
    refuse_devices(model)
    for name, part in (*model.named_modules(), *model.named_parameters()):
        found = sorted({cls.__name__ for cls in type(part).__mro__} & _PARTS)
        if found:
            raise TypeError(
                f"model must hold whole parameters; {name or 'it'!r} was a {found[0]} (FSDP, tensor parallelism), of "
                "which each process holds a part. Use DistributedDataParallel, or norms before the model is sharded"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise TypeError(
                f"model must have real parameters; {name!r} was {parameter.dtype}. Hold its two parts in one real "
                "parameter and view that as complex (torch.view_as_complex)"
            )


def refuse_mixing(model: nn.Module, *, training: bool) -> None:
    """Raise ValueError for a layer that computes with the statistics of the batch.

    ``training``: modules run in their own mode rather than in evaluation mode.
    """
    for path, module in model.named_modules():
        if module.__dict__.get("scale_grad_by_freq"):
            raise ValueError(
                "model must not mix the samples of a batch, or there is no gradient per sample; its embedding "
                f"{path or type(model).__name__!r} divides gradients by counts over the batch (scale_grad_by_freq=True)"
            )
        if not isinstance(module, BatchNorm):
            continue
        if training and module.training:
            why, advice = "is in training mode", " (call model.eval())"
        elif module.running_mean is None:
            why, advice = "keeps no running statistics", ""
        else:
            continue
        raise ValueError(
            "model must not mix the samples of a batch, or there is no gradient per sample; its batch norm "
            f"{path or type(model).__name__!r} {why}, so it normalises with the statistics of the batch{advice}"
        )
