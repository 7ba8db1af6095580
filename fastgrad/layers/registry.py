"""The registry of layer rules, looked up along the class hierarchy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgrad import checks

RuleFunction = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]
ReplayFunction = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Sequence[Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class LayerRule:
    """How one family of layers turns (input, output gradient) into squared norms.

    Attributes:
        name: The family, as it appears in ``GradientFeatures.report()``.
        function: ``(module, input, output gradient) -> {own parameter: (B,)}``. Both tensors carry the batch in
            dimension 0. The module is a private copy, in evaluation mode except within ``record``.
        positions: Whether further dimensions may stand between the batch and the layer's own, as when a network folds
            windows or frames into the batch.
        in_place: Whether the layer's output may be passed on without a copy: its operation does not need it for the
            backward pass.
    """

    name: str
    function: RuleFunction
    positions: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class ReplayRule:
    """How to compute the squared norms of a layer whose parameters act in the middle of its computation.

    Such a layer (attention, recurrent) is computed once more in the backward pass, from its recorded inputs.

    Attributes:
        name: The family, as it appears in ``GradientFeatures.report()``.
        function: ``(module, args, kwargs, output gradients) -> {parameter: (B,)}``; the gradients are those of the
            floating-point tensors among the outputs, in order.
        children: Parameters of child modules which this module uses itself, by dotted name.
    """

    name: str
    function: ReplayFunction
    children: tuple[str, ...] = ()


Rule = LayerRule | ReplayRule
#: Methods in which a layer computes its output; PyTorch's convolutions use the second.
_COMPUTING = frozenset({"forward", "_conv_forward"})
#: The rule of each layer, by its class or full dotted name.
RULES: dict[type[nn.Module] | str, Rule] = {}


def register_rule(
    *module_types: type[nn.Module] | str, name: str | None = None, positions: bool = False, in_place: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule for modules of these types and their subclasses.

    The rule of the nearest class in a module's method resolution order is taken. It does not apply to subclasses that
    override ``forward``, or ``_conv_forward`` of PyTorch's convolutions. A later registration replaces an earlier one.

    Args:
        *module_types: The ``torch.nn.Module`` subclasses the rule is for, or their full dotted names where the
            library that defines them need not be installed.
        name: The family's name in reports; the function's name by default.
        positions: See `LayerRule`.
        in_place: See `LayerRule`.

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
        if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"module_types must be torch.nn.Module subclasses or names; one was {kind!r}")

    def decorate(function: RuleFunction) -> RuleFunction:
        family: str = name if name is not None else getattr(function, "__name__", "rule")
        rule = LayerRule(family, function, positions, in_place)
        RULES.update(dict.fromkeys(module_types, rule))
        return function

    return decorate


def find_rule(module: nn.Module) -> tuple[Rule | None, str]:
    """Return the rule for a module and an empty string, or None and the reason for the general fallback."""
    checks.is_a(nn.Module, module=module)
    if not _COMPUTING.isdisjoint(vars(module)):
        return None, "its forward method was replaced on the instance"
    for cls in type(module).__mro__:
        rule = RULES.get(cls) or RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule, ""
        if not _COMPUTING.isdisjoint(vars(cls)):
            break
    return None, f"{cls.__name__} has no rule"
