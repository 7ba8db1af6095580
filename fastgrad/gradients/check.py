"""``check``: what each sample's own output is, and whether samples interact, before anything is trained on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import outside_of_compilation
from fastgrad.engine import compare, ordinary
from fastgrad.engine.inputs import BatchDims, CallInputs
from fastgrad.engine.outputs import find_place, flatten, join, output_name
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.routes import Route, routes_of
from fastgrad.engine.run import run
from fastgrad.engine.sharded import named_parameters
from fastgrad.engine.writes import Snapshot, entries
from fastgrad.gradients.recorder import checks_batch_dims
from fastgrad.layers.call import NotPerSampleError


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        outputs: By the name of each output that is a tensor: "dimension d" if this holds the batch, "a row for each
            sample" of what the model reduces, or "the same for all samples".
        mixes: Outputs and attributes for which a sample alone differs from the batch, and why the model is refused.
        draws: Functions that draw random numbers, which were left out of the comparison.
        routes: How the norms of each parameter are computed; empty if the model is refused.
        dtype: In which the samples were compared with the batch.
    """

    outputs: dict[str, str]
    mixes: tuple[str, ...]
    draws: tuple[str, ...]
    routes: tuple[Route, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        lines = [f"{output_name(name).removeprefix('its ')}: {what}" for name, what in self.outputs.items()]
        lines += [f"mixes samples: {what}" for what in self.mixes] or [f"samples do not interact ({self.dtype})"]
        lines += [f"draws random numbers: {', '.join(self.draws)}"] if self.draws else []
        return "\n".join([*lines, *(f"{route.parameter}: {route.route}, {route.reason}" for route in self.routes)])


def check(model: nn.Module, *args: Any, batch_dims: BatchDims = None, **kwargs: Any) -> Check:
    """Compare each sample alone with the batch, outputs and attributes, and say how each parameter is followed.

    The comparison is made on a copy in float64, if the model can be copied and runs in it, in the present mode of its
    modules, without random numbers. A term that is zero at present, such as a gate, hides mixing from every such
    comparison: check again after training.

    Args:
        model: As for `record`.
        *args: Inputs with at least two samples.
        batch_dims: As for `record`.
        **kwargs: Inputs by keyword.

    Raises:
        TypeError, ValueError: As `record`, and for fewer than two samples.
    """
    checks.is_a(nn.Module, model=model)
    checks_batch_dims(batch_dims)
    refuse_parts(model)
    refuse_mixing(model, training=True)
    samples = CallInputs(model.forward, args, kwargs, batch_dims).samples
    if samples < 2:
        raise ValueError(
            f"inputs must hold at least two samples, because a batch of one mixes nothing; they held {samples}"
        )
    return outside_of_compilation(_check)(model, args, kwargs, batch_dims)


def _check(model: nn.Module, args: Any, kwargs: Any, batch_dims: BatchDims) -> Check:
    wide = compare.twin(model)
    try:
        if wide is not None:
            own, named = compare.widened((args, kwargs))
            return _checked(wide, own, named, batch_dims)
    except (RuntimeError, TypeError, NotImplementedError):  # float64 meets what the model makes in another dtype
        pass
    return _checked(copy.deepcopy(model), args, kwargs, batch_dims)


def _checked(model: nn.Module, args: Any, kwargs: Any, batch_dims: BatchDims) -> Check:
    inputs, modules = CallInputs(model.forward, args, kwargs, batch_dims), list(model.named_modules())
    snapshot = Snapshot(modules, inputs.objects, inputs.leaves)

    def call(index: Tensor | None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return outputs and changed attributes by name, and what draws."""
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in inputs.rows(index)]
        (values, _, names), quiet = ordinary.call(model, inputs.call_of(leaves), snapshot)
        found = {output_name(name): value for name, value in zip(names, values, strict=True)}
        for place, value in snapshot.changes().items():
            found |= {f"attribute {snapshot.name(at)!r}": t.detach() for at, t in entries(place, value, Tensor)}
        snapshot.restore()
        return found, tuple(quiet.names)

    batch, draws = call(None)
    alone = [call(torch.tensor([i], device="cpu"))[0] for i in range(inputs.samples)]
    outputs, mixes = {}, []
    for name, whole in batch.items():
        if not isinstance(whole, Tensor):
            continue
        each = [own.get(name) for own in alone]
        shapes = {tuple(t.shape) if isinstance(t, Tensor) else None for t in each}
        try:
            if len(shapes) > 1 or None in shapes:
                raise NotPerSampleError(f"{name} has other shapes for some samples")
            rows = torch.stack(each)  # type: ignore[arg-type]
            place = find_place(rows.shape[1:], whole.shape, inputs.samples, name)
            mixed = compare.differing([(name, join(rows, place))], {name: whole})
            mixes += [f"{name} differs from that in the batch" for name in mixed]
        except NotPerSampleError as error:
            mixes.append(str(error))
            continue
        if name.startswith("its output"):
            key = name.removeprefix("its output").strip()
            outputs[key] = "a row for each sample" if place is None else f"dimension {place}"
    routes: list[Route] = []
    named = named_parameters(model)
    parameters = {id(p): name for name, p in named.items()}
    try:
        with ordinary.Quiet():
            output, recorded = run(
                model, lambda own: own, args, kwargs, {id(p): p for p in named.values()}, undo=True,
                modules=modules, batch_dims=batch_dims, compared=True,
            )  # fmt: skip
        shared = zip(flatten(output)[2], recorded.rows, flatten(output)[0], strict=True)
        outputs |= {name: "the same for all samples" for name, rows, t in shared if not rows and isinstance(t, Tensor)}
        routes = routes_of(recorded, parameters)
        recorded.close()
    except NotPerSampleError as error:
        mixes.append(str(error))
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    return Check(outputs, tuple(mixes), draws, tuple(routes), dtype)
