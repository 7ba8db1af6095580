"""Refuse models whose parameters are not whole or whose samples depend on each other, before any work."""

from __future__ import annotations

from torch import nn

from fastgrad._torch import BatchNorm, shards_in
from fastgrad.evaluation import refuse_devices, refuse_scripted

#: Names of the classes that hold a part of a parameter, or of several.
_PARTS = frozenset({"DTensor", "FullyShardedDataParallel", "ShardedTensor"})


def refuse_parts(model: nn.Module, *, gathered: bool = False) -> None:
    """Raise if this process cannot compute a squared norm of each parameter of the model.

    TypeError if a parameter is complex or sharded over processes, or a module is scripted. ValueError if a parameter
    holds no values, or its device has no float64. With ``gathered``, ``fully_shard`` may shard parameters, because its
    hooks gather them.
    """
    refuse_scripted(model)
    refuse_devices(model)
    shards = shards_in(model) if gathered else []
    whole = {id(part) for parts, _, split in shards if not split for part in parts}
    for name, part in (*model.named_modules(), *model.named_parameters()):
        found = sorted({cls.__name__ for cls in type(part).__mro__} & _PARTS)
        if found and id(part) not in whole:
            raise TypeError(
                f"model must hold whole parameters; {name or 'model'!r} was a {found[0]} (FSDP, tensor parallelism), "
                "of which each process holds a part. Use DistributedDataParallel, or record with fully_shard alone"
            )
        if isinstance(part, nn.Parameter) and part.is_complex():
            raise TypeError(
                f"model must have real parameters; {name!r} was {part.dtype}. Hold its two parts in one real "
                "parameter and view that as complex (torch.view_as_complex)"
            )


def refuse_mixing(model: nn.Module, *, training: bool) -> None:
    """Raise ValueError for a layer that uses statistics of the batch; with ``training``, also because of its mode."""
    mixes = "normalises with the statistics of the batch"
    for path, module in model.named_modules():
        name, norm = path or type(model).__name__, isinstance(module, BatchNorm)
        if module.__dict__.get("scale_grad_by_freq"):
            how = f"embedding {name!r} divides gradients by counts over the batch (scale_grad_by_freq=True)"
        elif norm and training and module.training:
            how = f"batch norm {name!r} is in training mode, so it {mixes} (call model.eval(), or use group norm)"
        elif norm and module.running_mean is None:
            how = f"batch norm {name!r} keeps no running statistics, so it {mixes}"
        else:
            continue
        raise ValueError(f"model must not mix the samples of a batch, or there is no gradient per sample; its {how}")
