"""Recording a function, backward pass included, as one flat graph of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol of a graph that is being traced."""
    return isinstance(size, torch.SymInt)


def trace(function: Callable[..., Any], inputs: Any, batch: int | None) -> torch.fx.GraphModule:
    """Run ``function(*inputs)`` once on tensors without data and record every operation.

    Operations of `torch.autograd.grad` inside the function are recorded like all others.

    Args:
        function: What to record.
        inputs: Tuple of example inputs of any structure.
        batch: Size of dimension 0 that marks a tensor as one that carries the batch, whose size becomes a symbol;
            at least 2, since sizes 0 and 1 are special to the tracer. None records constant sizes.

    Returns:
        A module that takes the inputs' tensors positionally.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    leaves, spec = pytree.tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(i: int) -> Tensor:
        tensor: Tensor = leaves[i]
        carries = tensor.dim() > 0 and tensor.shape[0] == batch
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

    # Some operators compute shapes in C++, where a symbolic size would become a number; the dispatcher takes the
    # Python form. "real" here means: take the tensors as they are, which are fake ones already.
    fakes = [fake(i) for i in places]
    with mode, enable_python_dispatcher():
        return make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
