"""What a call of a model must give: the gradients of each sample in float64, and the model as it is left."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class WrongError(Exception):
    """An answer that is not the loop's, an error that names nothing, or a model that was changed."""


class RefusedError(Exception):
    """A refusal that names what is not supported; its cause is what the package raised."""


class InvalidError(Exception):
    """A call that the model itself does not bear."""


def floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def losses_of(output: Any, samples: int) -> Tensor:
    """One loss a sample, of all that the model returns."""
    total = torch.zeros(())
    for out in floats(output):
        rows = out.reshape(samples, out.numel() // max(1, samples))
        weights = torch.cos(torch.arange(rows.shape[1]) * 1.7).to(rows)
        total = total + (rows * weights).sum(1) + rows.square().sum(1)
    return total


def ones_losses(loss: str, z: Tensor) -> Tensor:
    """The loss of the target of ones, class by class."""
    if loss == "bce":
        return nn.functional.softplus(-z).sum(1)
    return (z - 1).square().sum(1) if loss == "mse" else -z.log_softmax(1).sum(1)


def state(model: nn.Module) -> dict[str, Any]:
    """What a call must leave as it was."""
    held: dict[str, Any] = {}
    for path, module in model.named_modules():
        held |= {f"{path}.{k}": v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        held[f"{path}:names"] = sorted(vars(module))
    for name, p in model.named_parameters():
        held[name] = (p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
    return held | {name: b.clone() for name, b in model.named_buffers()}


def alike(a: Any, b: Any) -> bool:
    """Whether two such values are equal."""
    leaves, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(leaves) == len(others) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(leaves, others, strict=True)
    )


def gradients_of(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradient of each parameter, zero if the loss does not depend on it."""
    asked = [p for p in parameters if p.requires_grad] if loss.requires_grad else []
    grads = torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True) if asked else ()
    found = dict(zip(asked, grads, strict=True))
    return [torch.zeros_like(p) if found.get(p) is None else found[p] for p in parameters]


def widened(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A copy of the model, and inputs, in float64."""
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return copy.deepcopy(model).double(), wide


def require_independence(model: nn.Module, inputs: Any) -> None:
    """Raise InvalidError if samples interact in a way that shows in gradients: no output need show it."""
    parameters, xs = list(model.parameters()), inputs["x"].split(1)
    for i, loss in enumerate(losses_of(copied(model)(**inputs), len(xs))):
        alone = losses_of(copied(model)(**inputs | {"x": xs[i]}), 1)[0]
        for a, b in zip(gradients_of(loss, parameters), gradients_of(alone, parameters), strict=True):
            if not torch.allclose(a, b):
                raise InvalidError("samples interact")


class Names(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def ways(model: nn.Module, inputs: Any) -> set[tuple[str, ...]]:
    """The sequences of functions that the model calls for the batch and for single samples, with several seeds."""
    found = set()
    for seed, x in itertools.product(range(8), (inputs["x"], *inputs["x"].split(1))):
        torch.manual_seed(seed)
        with Names() as names:
            copy.deepcopy(model)(**inputs | {"x": x})
        found.add(tuple(names.called))
    return found


def truth(
    model: nn.Module, inputs: Any, losses: Any, seed: int, *, trainable: bool = False, evaluate: bool = False
) -> Any:
    """Run a copy of the model without the package, with the batch as the input ``x``.

    Returns what it gives for the samples, the copy after a call of the batch, the state of the random numbers, and for
    every sample the gradients of its loss (``losses(output, samples)`` is ``(B,)``) in float64; with ``trainable`` only
    of parameters that require one. Each sample runs alone, unless the model draws random numbers.
    """
    plain = copy.deepcopy(model).eval() if evaluate else copy.deepcopy(model)
    before = copy.deepcopy(plain)
    double, wide = widened(plain, inputs)
    for p in double.parameters():
        p.requires_grad_(p.requires_grad or not trainable)
    samples = len(inputs["x"])
    try:
        torch.manual_seed(seed)
        started = torch.get_rng_state()
        output = plain(**inputs)
        drawn = torch.get_rng_state()
        torch.manual_seed(seed)
        if torch.equal(started, drawn) and samples:
            rows = [copy.deepcopy(before)(**inputs | {"x": x}) for x in inputs["x"].split(1)]
            output = [torch.cat(each) for each in zip(*map(floats, rows), strict=True)]
            each = torch.cat([losses(copied(double)(**wide | {"x": x}), 1) for x in wide["x"].split(1)])
            if not torch.equal(started, torch.get_rng_state()):
                raise InvalidError("a sample alone draws random numbers, the batch does not")
        else:
            require_independence(copied(double).eval(), wide)
            torch.manual_seed(seed)
            each = losses(double(**wide), samples)
        again = copied(double)
        total, left = losses(again(**wide), samples).sum(), state(again)
        gradients_of(total, list(again.parameters()))
    except InvalidError:
        raise
    except Exception as error:  # whatever the model itself does not bear
        raise InvalidError(str(error)) from error
    if not alike(left, state(again)):
        raise InvalidError("a checkpoint computes again with what forward has changed")
    wanted = [p for p in double.parameters() if p.requires_grad]

    rows = [gradients_of(loss, wanted) for loss in each[:samples]]
    if rows and not alike(gradients_of(each[0], wanted), rows[0]):
        raise InvalidError("a checkpoint computes again with what forward has changed")
    return output, plain, drawn, rows


def copied(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def squared(rows: Any, columns: int) -> Tensor:
    """Squared norms ``(B, P)``."""
    norms = [[float(g.square().sum()) for g in row] for row in rows]
    return torch.tensor(norms, dtype=torch.float64).reshape(len(rows), columns)


def tolerance(dtype: torch.dtype) -> float:
    """A wrong route is wrong by a factor; how exact right ones are, tests of the layers say."""
    return 1e-2 if dtype == torch.float32 else 1e-6


def compare(what: str, found: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    """Raise WrongError where numbers differ."""
    if found.shape != true.shape:
        raise WrongError(f"{what} have shape {tuple(found.shape)} instead of {tuple(true.shape)}")
    if found.numel() == 0 or not true.isfinite().all():
        return
    # What vanishes in exact arithmetic is rounding; norms of equal numbers, one behind the other, amplify it by far: a
    # norm of zeros alone by 1 / sqrt(eps), which in float64 makes of one eps the floor of all rows.
    eps = torch.finfo(dtype).eps
    floor = min(1e9 * eps, 1e-2) ** 2 * true.abs().amax(-1, keepdim=True).clamp_min(1e-2)
    error = ((found.double() - true).abs() - floor).clamp_min(0) / true.abs().clamp_min(1e-300)
    if not error.max() <= tolerance(dtype):
        raise WrongError(f"{what} are off by a factor {float(error.max()):.2g}")


def same_output(output: Any, plain: Any, *, exact: bool = False) -> None:
    """Raise WrongError where the package changes what the model returns; ``exact`` allows only rounding errors."""
    for a, b in zip(floats(output), floats(plain), strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        rtol = 100 * torch.finfo(a.dtype).eps if exact else 1e-3
        if not torch.allclose(a, b, rtol=rtol, atol=0.1 * rtol * scale):
            raise WrongError("the model's output differs from that without the package")
