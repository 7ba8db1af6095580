"""What a call of a model must give: the gradients of each sample in float64, and the model as it is left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
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
    total = torch.zeros(samples)
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


def states(model: nn.Module) -> list[Any]:
    """What is carried from call to call."""
    return [v for module in model.modules() for name, v in vars(module).items() if name.startswith("state")]


def of_sample(model: nn.Module, i: int, samples: int) -> nn.Module:
    """The model as a sample sees it: states hold its own row."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.startswith("state") and isinstance(value, Tensor) and len(value) == samples > 1:
                setattr(module, name, value[i : i + 1])
    return model


def truth(
    model: nn.Module, inputs: Any, losses: Any, seed: int, *, trainable: bool = False, evaluate: bool = False
) -> Any:
    """Run a copy of the model without the package, with the batch as the input ``x``.

    Returns what it gives for the samples, the copies that each of them leaves, whether random numbers are drawn, and
    for every sample the gradients of its loss (``losses(output, samples)`` is ``(B,)``) in float64; with ``trainable``
    only of parameters that require one. Of a model that draws random numbers, only the first is to be used.
    """
    before = copy.deepcopy(model).eval() if evaluate else copy.deepcopy(model)
    double, wide = widened(before, inputs)
    for p in double.parameters():
        p.requires_grad_(p.requires_grad or not trainable)
    samples = len(inputs["x"])
    if not any(True for _ in model.parameters()):
        raise InvalidError("without parameters, there is nothing to record")
    try:
        torch.manual_seed(seed)
        started = torch.get_rng_state()
        output = copy.deepcopy(before)(**inputs)
        draws = not torch.equal(started, torch.get_rng_state())
        left = [of_sample(copy.deepcopy(before), i, samples) for i in range(samples)]
        if not samples:
            return output, [], draws, []
        rows = [own(**inputs | {"x": x}) for own, x in zip(left, inputs["x"].split(1), strict=True)]
        if draws != (not torch.equal(started, torch.get_rng_state())):
            raise InvalidError("the batch draws random numbers, a sample alone does not, or the other way round")
        wanted = [p for p in double.parameters() if p.requires_grad]
        alone = []
        for i, x in enumerate(wide["x"].split(1)):
            own = of_sample(copied(double), i, samples)
            (loss,) = losses(own(**wide | {"x": x}), 1)
            after, grads = (state(own), states(own)), gradients_of(loss, wanted)
            if not alike(after, (state(own), states(own))) or not alike(grads, gradients_of(loss, wanted)):
                raise InvalidError("a checkpoint computes again with what forward has changed")
            alone.append(grads)
    except InvalidError:
        raise
    except Exception as error:  # whatever the model itself does not bear
        raise InvalidError(str(error)) from error
    output = [torch.cat([t.reshape(1, -1) for t in each]) for each in zip(*map(floats, rows), strict=True)]
    return output, left, draws, alone


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
        if a.dim() and len(a):
            a = a.reshape(len(b), -1)
        if not b.isfinite().all():
            continue
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        rtol = 100 * torch.finfo(a.dtype).eps if exact else 1e-3
        if not torch.allclose(a, b, rtol=rtol, atol=0.1 * rtol * scale):
            raise WrongError("the model's output differs from that without the package")
