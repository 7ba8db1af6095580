"""What stands in for the ``forward`` of a user's module while it is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Redirect:
    """What stands in for ``forward`` of a user's module while a thread records it.

    Args:
        module: The module; in other threads its own ``forward`` runs.
        call: Called with the module, its own ``forward`` and the inputs.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._own = module.__dict__.get("forward")
        self._forward = module.forward
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as ``forward`` of the module."""
        return self._call(self._module, self._forward, args, kwargs)

    def restore(self, state: dict[str, Any]) -> None:
        """Put back the ``forward`` which ``state``, a module's ``__dict__``, had before."""
        if self._own is None:
            state.pop("forward", None)
        else:
            state["forward"] = self._own
