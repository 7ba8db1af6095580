"""Run a user's model in evaluation mode, and leave it as it was."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import original
from fastgrad.batches import copied

#: What a hook gets once its module has run: the inputs, those given by keyword last, and the output.
Hook = Callable[[tuple[Any, ...], Any], None]

# Threads take turns: a second one would take the evaluation mode of the first for the model's own mode. The keys are
# ids of first parameters, which a model and its wrappers share.
_turns: dict[int, threading.RLock] = {}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside; restore the mode and buffers of every module afterwards, also after an error."""
    with _turns.setdefault(id(next(model.parameters(), model)), threading.RLock()), buffers_kept(model):
        # A module that TorchScript has frozen has no mode.
        modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
        # eval() is not called, because a module's own train() may change weights: loralib's merges them.
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the network's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class Evaluated:
    """A model in evaluation mode, or a copy of it that is; other threads may train the model meanwhile.

    A copy shares the parameters. One is made if a module is in training mode or compiled, as a compiler does not follow
    hooks that are added later; compiled modules are copies of the original ones. ValueError if it cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = _modules(model)
        # PyTorch's encoder has a kernel that would call none of the modules inside.
        self._fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in modules)
        compiled = [m for m in modules if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
        ready = not compiled and not any(module.training for module in modules)
        #: What runs.
        self.model = model if ready else evaluation_copy(model, compiled)

    def run(self, args: Any, kwargs: Any, hooks: Iterable[tuple[nn.Module, Hook]] = ()) -> Any:
        """Return the output for a copy of the inputs, without gradients.

        Each hook is called after its module has run in this thread and this call, before the user's own hooks.
        """
        args, kwargs = copied((args, kwargs))
        with torch.no_grad(), _hooked(hooks), _unfused() if self._fused else contextlib.nullcontext():
            return self.model(*args, **kwargs)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules without their names, which would take a percent of a small network's forward pass."""
    found, known = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found


def evaluation_copy(model: nn.Module, compiled: Sequence[nn.Module] = ()) -> nn.Module:
    """Return a copy in evaluation mode that shares parameters and tensors in attributes, with these modules compiled.

    Tensors that were made in inference mode, which no graph can use, are copied. ValueError if it cannot be copied.
    """
    tensors = (value for m in _modules(model) for value in (*m._parameters.values(), *vars(m).values()))
    shared: dict[int, Any] = {id(t): t for t in tensors if isinstance(t, Tensor) and not t.is_inference()}
    shared |= {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    try:
        # Inner ones first.
        for module in reversed(compiled):
            shared[id(module)] = copy.deepcopy(original(module), shared)
        made = copy.deepcopy(model, shared)
    except Exception as error:
        raise ValueError(
            "model must be in evaluation mode and not compiled, or one that copy.deepcopy can copy; call model.eval(). "
            f"Copying it raised {type(error).__name__}: {error}"
        ) from error
    for module in made.modules():
        module.training = False
    return made


@contextlib.contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    thread = threading.get_ident()

    def of_this_thread(hook: Hook) -> Callable[..., None]:
        def called(_: nn.Module, args: Any, *rest: Any) -> None:
            # Another thread may see a hook appear or go while it calls the module, and give it no keyword arguments.
            if threading.get_ident() == thread:
                kwargs, output = rest
                hook((*args, *kwargs.values()), output)

        return called

    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(of_this_thread(hook), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Fused:
    """The switch of PyTorch's fused encoder, which belongs to the process: threads that turn it off are counted."""

    lock = threading.Lock()
    refused = 0
    before = True


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    with _Fused.lock:
        if not _Fused.refused:
            _Fused.before = torch.backends.mha.get_fastpath_enabled()
        _Fused.refused += 1
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _Fused.lock:
            _Fused.refused -= 1
            if not _Fused.refused:
                torch.backends.mha.set_fastpath_enabled(_Fused.before)


class RandomState:
    """State of the generators that these modules may draw from: PyTorch's on their devices, NumPy's and Python's."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        devices = {p.device for module in modules for p in module._parameters.values() if p is not None}
        self._devices = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
        self._torch = self._read()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002  (the state that models draw from)
        self._python = random.getstate()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def same(self) -> bool:
        """Whether nothing was drawn since."""
        _, keys, *rest = np.random.get_state()  # noqa: NPY002
        return (
            all(map(torch.equal, self._read(), self._torch))
            and random.getstate() == self._python
            and rest == list(self._numpy[2:])
            and np.array_equal(keys, self._numpy[1])
        )

    def restore(self) -> None:
        """Restore the states."""
        torch.set_rng_state(self._torch[0])
        for device, state in zip(self._devices, self._torch[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of modules and their numbers.

    Quantization observers change buffers in evaluation mode, too, and a forward pass may replace them. If it also
    replaces other attributes, the new buffers stay, because a table goes with its length.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _may_be_written(buffer)]
    # Buffers of a scripted module cannot be replaced.
    held = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    try:
        yield
    finally:
        if all(_holds_same(vars(m), own) and m._buffers.keys() == buffers.keys() for m, own, buffers in held):
            for module, _, buffers in held:
                module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in before:
                if _has_changed(buffer, value):
                    (buffer if buffer.shape == value.shape else buffer.resize_(value.shape)).copy_(value)


def _holds_same(own: dict[str, Any], before: dict[str, Any]) -> bool:
    return len(own) == len(before) and all(own.get(name, before) is value for name, value in before.items())


def _may_be_written(buffer: Tensor) -> bool:
    """Whether a plain tensor has memory for each of its numbers; a copy of any other may be larger than its memory."""
    plain = type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta
    return plain and buffer.nbytes <= buffer.untyped_storage().nbytes()


def _has_changed(buffer: Tensor, value: Tensor) -> bool:
    """Whether the numbers differ from ``value``; kernels of observers change them without a new version."""
    try:
        return not torch.equal(buffer, value)
    except NotImplementedError:
        # Formats that cannot be compared, as of four bits, are not written to by any function.
        return False


def agree(again: Tensor, output: Tensor, precision: float = 0.0) -> bool:
    """Whether two computations of one output agree in half the digits of its dtype, or of ``precision`` if coarser."""
    if again.shape != output.shape or again.dtype != output.dtype:
        return False
    if again.numel() == 0:
        return True
    if output.is_floating_point() or output.is_complex():
        precision = max(precision, torch.finfo(output.dtype).eps)
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (again.detach(), output.detach()))
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).abs().max() <= math.sqrt(precision) * b.abs().max())


def refuse_scripted(model: nn.Module) -> None:
    """Raise TypeError for a scripted or traced module, whose parts Python does not call."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be made of ordinary modules; {name or 'model'!r} was a {type(module).__name__} (torch.jit)"
                ". Use the module that it was made of"
            )


def refuse_devices(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters hold no values, or lie where nothing can be float64."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            was = "on the meta device" if parameter.is_meta else "not initialized (call a lazy module once before)"
            raise ValueError(f"model must hold values; its parameter {name!r} was {was}")
        checks.has_float64(f"parameter {name!r} of model", parameter)
