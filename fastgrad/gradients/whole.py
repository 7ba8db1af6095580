"""Models whose parameters lie in parts on several processes, of which one alone knows no norm."""

from __future__ import annotations

from torch import nn

#: Names of the classes that hold a part of a parameter, or of several.
_PARTS = frozenset({"DTensor", "FlatParameter", "ShardedTensor"})


def refuse_parts(model: nn.Module) -> None:
    """Raise TypeError if a parameter of ``model`` is one part of several, as under FSDP or tensor parallelism."""
    for name, parameter in model.named_parameters():
        kinds = {cls.__name__ for kind in (type(parameter), type(parameter.data)) for cls in kind.__mro__}
        found = sorted(kinds & _PARTS)
        if found:
            raise TypeError(
                f"model must hold whole parameters; {name!r} was a {found[0]} (FSDP, tensor parallelism), of which "
                "each process holds a part. Use DistributedDataParallel, or norms before the model is sharded"
            )
