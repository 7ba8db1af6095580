"""Rules that users register for modules, which the engine then treats as one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrad.layers.formula import Formula, Tensors

RuleFunction = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ModuleRule:
    """How modules of one kind turn (input, output gradient) into squared norms; see `register_rule`."""

    name: str
    function: RuleFunction


#: The rule of modules of each class.
MODULES: dict[type[nn.Module], ModuleRule] = {}


def register_rule(*module_types: type[nn.Module], name: str | None = None) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule for modules of these types and their subclasses.

    The function is ``(module, input, output gradient) -> {own parameter: (B,)}``; both tensors carry the batch in
    dimension 0. Such a module runs on the batch as a whole, as one function, so it must treat each sample by itself,
    and take and return one tensor. The rule of the nearest class in a module's method resolution order is taken. It
    does not apply to subclasses that override ``forward``. A later registration replaces an earlier one. Modules
    without a rule need none: the functions that they call have rules.

    Args:
        *module_types: The ``torch.nn.Module`` subclasses the rule is for.
        name: The family's name in reports; the function's name by default.

    Raises:
        TypeError: If no type is given or one is not a ``torch.nn.Module`` subclass.

    Example::

        @register_rule(MyScale)
        def my_scale(module, input, grad_output):
            return {"scale": (grad_output * input).flatten(1).sum(1).square()}
    """
    if not module_types:
        raise TypeError("register_rule needs at least one torch.nn.Module subclass; it was given none")
    for kind in module_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"module_types must be torch.nn.Module subclasses; one was {kind!r}")

    def decorate(function: RuleFunction) -> RuleFunction:
        rule = ModuleRule(name if name is not None else getattr(function, "__name__", "rule"), function)
        MODULES.update(dict.fromkeys(module_types, rule))
        return function

    return decorate


def rule_of(module: nn.Module) -> ModuleRule | None:
    """Return the registered rule of a module; None if it has none, or computes its output in another way."""
    for cls in type(module).__mro__:
        if cls in MODULES:
            return MODULES[cls]
        if "forward" in vars(cls):
            break
    return None


class OfModule(Formula):
    """The formula of a module with a registered rule; gradients themselves come from autograd, sample by sample."""

    def __init__(self, module: nn.Module, rule: ModuleRule) -> None:
        self._module, self._rule, self.name = module, rule, rule.name
        own = {name: p for name, p in module._parameters.items() if p is not None}
        self._names, self.weights = list(own), list(own.values())

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        norms = self._rule.function(self._module, saved[0], gradients[0])
        return [norms[self._names[slot]] for slot in slots]

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        table, name = self._module._parameters, self._names[slot]
        own, value = table[name], self.weights[slot].detach().requires_grad_()
        found = []
        try:
            table[name] = value  # type: ignore[assignment]
            for a, g in zip(saved[0].split(1), gradients[0].split(1), strict=True):
                with torch.enable_grad():
                    output = type(self._module).forward(self._module, a)
                found.append(torch.autograd.grad(output, value, g)[0])
        finally:
            table[name] = own
        return torch.stack(found)
