"""The mode that follows a model under vmap: it applies rules, copies parameters and splits the batch by values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad._torch import functorch, lowered, pytree, saved_tensor_hooks
from fastgrad.engine.recompute import Inside, follow, kept_elsewhere
from fastgrad.engine.writes import Snapshot
from fastgrad.layers import ENTERED, RULES
from fastgrad.layers.call import Call, NotPerSampleError, Refused


class Split(Exception):  # noqa: N818 - the batch is split, nothing is wrong
    """The model read a value that is not the same for all samples; ``values`` ``(B, n)`` has a row for each."""

    def __init__(self, values: Tensor) -> None:
        super().__init__("the model read a value that differs between samples")
        self.values = values


def getter(name: str) -> Callable[..., Any]:
    """Return the function by which a mode sees an attribute of a tensor."""
    found: Callable[..., Any] = getattr(Tensor, name).__get__
    return found


#: Functions that read values of a tensor into Python.
_READS = {getattr(Tensor, n) for n in ("__bool__", "item", "__float__", "__int__", "__index__", "tolist")}
_METHODS = (
    "size", "dim", "numel", "is_floating_point", "stride", "element_size", "is_contiguous", "get_device", "ndimension",
    "__len__", "detach", "is_complex", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "__hash__",
)  # fmt: skip
_ATTRIBUTES = (
    "shape", "dtype", "device", "is_cuda", "ndim", "layout", "grad", "is_leaf", "is_sparse", "is_meta",
    "is_nested", "data", "is_quantized", "is_mps", "is_cpu",
)  # fmt: skip
#: Functions whose results do not depend on values of a parameter, or which cut its gradient.
_HARMLESS = {getattr(Tensor, name) for name in _METHODS} | {getter(name) for name in _ATTRIBUTES}
_HARMLESS |= {torch.is_floating_point, torch.zeros_like, torch.ones_like, torch.empty_like, torch.is_tensor}
_HARMLESS |= {nn.init.zeros_, nn.init.ones_}
#: Inside vmap, tensors of one sample seem to require no gradients.
_REQUIRES_GRAD = {getter("requires_grad")}
#: Functions that take gradients inside a forward pass, and functions that register hooks.
_DIFFERENTIATES = {torch.autograd.grad, Tensor.backward}
_HOOKS = {Tensor.register_hook, getter("grad_fn")}
#: Functions that create tensors of given sizes.
_CREATES = {torch.zeros, torch.ones, torch.empty, torch.full}
_CREATES |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}
_CREATES |= {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
#: Functions that draw random numbers of given sizes.
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.normal, torch.rand_like, torch.randn_like, torch.randint_like}
_DRAWS |= {torch.randperm}
_SEQUENCES = (list, tuple, dict)


class PerSample(TorchFunctionMode):
    """Follow the functions that a model calls on one sample, for a `Call`."""

    def __init__(
        self, call: Call, snapshot: Snapshot | None, doubtful: Mapping[int, str], inside: Inside | None, *,
        counts: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._call, self._counts, self._doubtful = call, counts, doubtful
        #: What is written is noted here; None if a checkpoint computes again.
        self._snapshot = snapshot
        self._inside = inside
        #: The hooks of the checkpoint that is under way.
        self._followed: Any = None
        #: References to the samples and to all results, by id.
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # torch.cond has the compiler trace through modes
            return func(*args, **(kwargs or {}))
        if func in _REQUIRES_GRAD:
            return self._call.physical(args[0]).requires_grad
        if func in _HARMLESS:
            out = func(*args, **(kwargs or {}))
        else:
            if self._snapshot is not None:
                self._snapshot.watch(func, args, kwargs or {})
            out = self._run(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._known[id(out)] = weakref.ref(out)
            if self._counts:
                self._call.bytes += out.numel() * out.element_size()
        elif isinstance(out, (tuple, list)):
            self.know(pytree.tree_leaves(out))
        return out

    def _refuse_states(self, args: Any, kwargs: Any) -> None:
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = next((self._doubtful[id(t)] for t in leaves if id(t) in self._doubtful), None)
        if name is not None and any(map(self._call.is_batched, leaves)):
            raise NotPerSampleError(
                "model must not read an attribute of the batch that no recorded call wrote; "
                f"{name!r} has a row for each sample. Reset such a state before recorded calls, and make a constant a "
                "buffer (register_buffer)"
            )

    def know(self, values: Iterable[Any]) -> None:
        """Take tensors for samples, or for results of functions that were seen."""
        self._known.update({id(t): weakref.ref(t) for t in values if isinstance(t, Tensor)})

    def require_known(self, values: Iterable[Any]) -> None:
        """Raise Refused for the result of a function that Python does not see, if a gradient is lost in it.

        Compiled scripts lose it under vmap, and no graph leads to a frozen parameter that such a function uses.
        """
        for t in values:
            if isinstance(t, Tensor):
                ref = self._known.get(id(t))
                if ref is not None and ref() is t:
                    continue
                if not self._call.is_batched(t) or not t.is_floating_point():
                    continue
                parameters = self._call.parameters.values()
                if not self._call.physical(t).requires_grad or not all(p.requires_grad for p in parameters):
                    raise Refused("it calls a function that Python does not see, such as a scripted one")
            elif type(t) in _SEQUENCES:
                self.require_known(t)

    def kept(self) -> list[Tensor]:
        """Return the tensors of one sample that are still alive, once each; Refused beside a checkpoint."""
        alive = [t for ref in self._known.values() if (t := ref()) is not None]
        self._known.clear()
        kept = [t for t in alive if self._call.is_batched(t)]
        if not self._call.checkpoints:
            return kept
        del alive
        if kept_elsewhere(kept, self._call.checkpoints):
            raise Refused("something keeps tensors that a checkpoint may need again")
        return []

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = self._call
        if self._doubtful:
            self._refuse_states(args, kwargs)
        if func in ENTERED:
            with self:
                return ENTERED[func](*args, **kwargs)
        if torch.is_grad_enabled():
            if self._snapshot is not None:
                self.require_known(args)
            hooks = saved_tensor_hooks()
            if hooks != call.hooks and hooks != self._followed:
                follow(call, self._inside)
                self._followed = hooks
            rule = RULES.get(func)
            if rule is not None:
                try:
                    out = rule(call, *args, **kwargs)
                except (TypeError, AttributeError, NameError) as error:
                    call.rule_failure = error
                    raise
                if out is not NotImplemented:
                    return out
            if any(type(a) in _SEQUENCES or id(a) in call.parameters for a in args) or kwargs:
                args, kwargs = self._with_copies(args, kwargs)
            if func in _DIFFERENTIATES:
                raise Refused("it takes gradients in its forward pass")
            if func in _HOOKS:
                raise Refused("a hook may change its gradients (register_hook)", hooked=True)
        if func in _READS:
            return self._read(func, *args)
        if func is Tensor.requires_grad_ and call.is_batched(args[0]):
            # As for inputs of checkpoints. The batch behind the sample is what has a graph.
            with lowered():
                func(functorch.get_unwrapped(args[0]), *args[1:], **kwargs)
            return args[0]
        if func in _DRAWS or (call.batch_new_tensors and func in _CREATES):
            return self._create(func, args, kwargs)
        return func(*args, **kwargs)

    def _with_copies(self, args: Any, kwargs: Any) -> Any:
        call = self._call
        if any(call.owns(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            call.require_level()
            return pytree.tree_map(lambda leaf: call.copy_of(leaf) if call.owns(leaf) else leaf, (args, kwargs))
        return args, kwargs

    def _read(self, func: Any, x: Tensor, *rest: Any) -> Any:
        """Return the value that all samples have; Split if they differ."""
        call = self._call
        if not call.is_batched(x):
            if functorch.maybe_current_level() != call.level:
                return func(x, *rest)
            with lowered():
                return func(x, *rest)
        values = call.physical(x).detach()
        if not bool((values == values[:1]).all()):
            raise Split(values.reshape(call.samples, -1))
        with lowered():
            return func(values[0], *rest)

    def _create(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Create a tensor one level lower, with a row for each sample if it is meant for the batch."""
        call = self._call
        if functorch.maybe_current_level() != call.level or any(map(call.is_batched, args)):
            return func(*args, **kwargs)
        with lowered():
            one = func(*args, **kwargs)
        if func in _DRAWS and one.shape[:1] != (1,):
            return one
        with lowered():
            if func in _DRAWS:
                every = torch.cat([one, *(func(*args, **kwargs) for _ in range(call.samples - 1))]).unsqueeze(1)
            else:
                every = one.unsqueeze(0).repeat(call.samples, *[1] * one.dim())
        return call.wrapped(every)
