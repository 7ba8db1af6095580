"""An ordinary call of a batch, beside the samples' own: its shapes and values are read, and it leaves no trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgrad._torch import pytree, saved_tensor_hooks, saving_plainly
from fastgrad.engine.outputs import Tree, flatten
from fastgrad.engine.writes import Snapshot
from fastgrad.layers.call import CHECKPOINT, Refused
from fastgrad.layers.norm import in_order

#: Functions that draw random numbers if one of their arguments says so, and the values with which they draw none.
_QUIET: dict[Callable[..., Any], dict[str, Any]] = {
    F.scaled_dot_product_attention: {"dropout_p": 0.0},
    F.multi_head_attention_forward: {"dropout_p": 0.0},
    **{
        function: {"training": False}
        for function in (
            F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu
        )
    },
}  # fmt: skip
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
#: Functions that draw from a generator that may be given.
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.normal, torch.bernoulli, torch.multinomial, torch.poisson}
_DRAWS |= {Tensor.bernoulli, Tensor.multinomial, torch.randperm}
_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
_FILLS = {
    getattr(Tensor, f"{name}_")
    for name in ("uniform", "normal", "bernoulli", "exponential", "random", "log_normal", "cauchy", "geometric")
}


@functools.cache
def _names(function: Callable[..., Any]) -> list[str]:
    if function is F.scaled_dot_product_attention:  # a builtin, which has no signature
        return ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    return list(inspect.signature(function).parameters)


class Quiet(TorchFunctionMode):
    """Functions draw no random numbers: dropout passes on what it gets, and all numbers of a tensor are one constant.

    No generator of the process is touched. ``names`` are the functions that would have drawn.
    """

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        super().__init__()
        self._snapshot = snapshot
        self.names: dict[str, None] = {}
        #: Whether a checkpoint inside computes again in the backward pass.
        self.checkpoints, self._hooks = False, saved_tensor_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # torch.cond has the compiler trace through modes
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        self.checkpoints |= saved_tensor_hooks() != self._hooks
        if self._snapshot is not None:
            self._snapshot.watch(func, args, kwargs)
        if func in _QUIET:
            return self._plainly(func, args, kwargs)
        if func in _RECURRENT:
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
        elif func in _DRAWS or func in _FILLS:
            return self._constant(func, args, kwargs)
        elif func in _LIKE:
            x, *_ = args
            options = {"dtype": x.dtype, "device": x.device} | kwargs
            options.pop("memory_format", None)
            return self._constant(_LIKE[func], (x.shape,), options)
        return func(*args, **kwargs)

    def _plainly(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(_names(func), args, strict=False)) | kwargs
        for name, value in _QUIET[func].items():
            if given.get(name, value) != value:
                self.names[func.__name__] = None
            given[name] = value
        return func(**given)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.names[func.__name__] = None
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        device = (
            tensor.device if tensor is not None else torch.device(kwargs.get("device") or torch.get_default_device())
        )
        out = func(*args, **{**kwargs, "generator": torch.Generator(device).manual_seed(0)})
        if func is torch.randperm:
            return out
        integers = [a for a in args if type(a) is int]
        with torch.no_grad():
            # Half of the way, or the lowest of several integers.
            return out.fill_(0.5 if out.is_floating_point() and "bernoulli" not in func.__name__ else
                             integers[0] if len(integers) > 1 else 0)  # fmt: skip


def call(forward: Callable[..., Any], given: tuple[Any, Any], snapshot: Snapshot) -> tuple[Tree, Quiet]:
    """Call ``forward`` on arguments ``given`` by place and by name; outputs have no graph.

    What it writes is for the caller to undo.
    """
    # Gradients are enabled as in the call itself, because hooks of tensors need them.
    with saving_plainly(), Quiet(snapshot) as quiet:
        values, rebuilt, names = flatten(forward(*given[0], **given[1]))
    # Autocast caches casts of parameters, and these belong to another graph.
    torch.clear_autocast_cache()
    return ([v.detach() if isinstance(v, Tensor) else v for v in values], rebuilt, names), quiet


class Dependent(TorchFunctionMode):
    """Notes which results depend on the samples ``given``: those computed from them, or written to with them."""

    def __init__(self, given: list[Any], snapshot: Snapshot, *, thawed: bool) -> None:
        super().__init__()
        self._found = {id(t): t for t in given}
        self._snapshot = snapshot
        self._hooks = saved_tensor_hooks() if thawed else None
        self._thawed = thawed

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the samples."""
        return id(tensor) in self._found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # torch.cond has the compiler trace through modes
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        self._snapshot.watch(func, args, kwargs)
        if self._thawed and saved_tensor_hooks() != self._hooks:
            raise Refused(CHECKPOINT)  # it computes again when the copies of frozen parameters are gone
        out = (in_order if func is F.batch_norm else func)(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(id(t) in self._found for t in leaves):
            written = args[:1] if getattr(func, "__name__", "").endswith("_") else ()
            for t in (*pytree.tree_leaves(out), *written):
                if isinstance(t, Tensor):
                    self._found[id(t)] = t
        return out
