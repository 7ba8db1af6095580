"""Forward hooks of this package on the copy of a model, among them those that norms need for correct gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import _torch
from fastgrad.engine.steps import unnoted


def attach(module: nn.Module, hook: Callable[..., Any], *, before: bool = False) -> None:
    """Put a forward hook (with keyword arguments) first on a shadow's module, ahead of the user's own.

    With ``before=True`` the hook runs last among the forward pre-hooks, so that it sees what ``forward`` gets. Its key
    is negative, below those that PyTorch gives.
    """
    kind = "_forward_pre_hooks" if before else "_forward_hooks"
    state, hook = module.__dict__, unnoted(hook)
    state[kind][-id(hook)] = hook
    state[kind + "_with_kwargs"][-id(hook)] = True
    if not before:
        state[kind].move_to_end(-id(hook), last=False)


def attach_layouts(module: nn.Module) -> None:
    """Give norms inputs and gradients in memory layouts for which PyTorch's CPU kernels compute correct gradients."""
    if isinstance(module, _torch.NormBase):
        attach(module, _lay_out_gradient)
        if _torch.is_traced():
            attach(module, _lay_out_input, before=True)
    elif isinstance(module, nn.GroupNorm):
        attach(module, _put_channels_first, before=True)


def _lay_out_gradient(module: nn.Module, _: Any, __: Any, output: Any) -> None:
    """Give a batch norm gradients in the memory layout of its output, as PyTorch's CPU kernel assumes.

    The kernel mistakes channels last for contiguous, or the reverse, if a dimension of size 1 has its own stride, as
    after a transposition. It then silently mixes up channels. Instance norm is a batch norm of one sample.
    """
    instance = isinstance(module, _torch.InstanceNorm)
    if isinstance(output, Tensor) and output.requires_grad and (instance or 1 in output.shape):
        stride = output.stride()
        output.register_hook(
            Tensor.contiguous
            if _torch.is_traced()
            else lambda g: g if g.stride() == stride else g.new_empty_strided(g.shape, stride).copy_(g)
        )


def _lay_out_input(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """Make such inputs contiguous in a graph, where tensors without data do not show the layout of the output."""
    if args and isinstance(args[0], Tensor) and 1 in args[0].shape:
        return (args[0].contiguous(), *args[1:]), kwargs
    return None


def _put_channels_first(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """Copy the input of a group norm to channels first if it needs no gradient.

    With channels last, PyTorch's CPU kernel would write to a gradient that does not exist, and crash the process.
    """
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.dim() > 3 and x.stride(1) == 1 and not x.requires_grad:
        return (x.clone(memory_format=torch.contiguous_format), *args[1:]), kwargs
    return None
