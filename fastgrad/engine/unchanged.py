"""What the backward pass reads of a module must be what the forward pass had."""

from __future__ import annotations

from torch import Tensor, nn


class Unchanged:
    """The parameters and buffers of a module at the time of its call.

    Args:
        path: The module's name in messages.
        module: The module.
        deep: Whether those of its descendants count as well.
    """

    def __init__(self, path: str, module: nn.Module, *, deep: bool = False) -> None:
        self._path = path or type(module).__name__
        self._versions: list[tuple[str, Tensor, int]] = []
        for name, part in module.named_modules() if deep else [("", module)]:
            for table in (part._parameters, part._buffers):
                for own, tensor in table.items():
                    if tensor is None or tensor.is_inference():
                        continue
                    self._versions.append((f"{name}.{own}".lstrip("."), tensor, tensor._version))

    def require(self) -> None:
        """Raise RuntimeError, as autograd does, if one of them was modified in place since."""
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name!r} of {self._path!r} must not be modified in place between the forward pass and its "
                    f"gradients; it was at version {version} and is at version {tensor._version}. Ask for the "
                    "norms before the optimizer's step"
                )
