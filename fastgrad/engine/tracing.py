"""Tracing an extraction to one flat graph with a dynamic batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def trace(function: Callable[[Any, Any], Any], args: Any, kwargs: Any, samples: int) -> torch.fx.GraphModule:
    """Trace ``function(args, kwargs)``, batch dynamic, to a graph that takes the inputs' tensors.

    Args:
        function: What to trace.
        args: Example inputs.
        kwargs: Example inputs by keyword.
        samples: Size of dimension 0 which marks a tensor as one that carries the batch.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(i: int) -> Tensor:
        tensor: Tensor = leaves[i]
        carries = tensor.dim() > 0 and tensor.shape[0] == samples
        sizes = [DimDynamic.DYNAMIC if carries and d == 0 else DimDynamic.STATIC for d in range(tensor.dim())]
        return mode.from_tensor(
            tensor,
            source=ConstantSource(f"input{i}"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
        )

    def flat(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(*pytree.tree_unflatten(filled, spec))

    # "real" here means: take the tensors as they are, which are fake ones already.
    inputs = [fake(i) for i in places]
    with mode, enable_python_dispatcher():
        return make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
