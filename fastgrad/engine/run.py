"""Attaching a plan's sites to the modules of one forward pass and gathering what its backward pass yields."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.engine.fallback import replay_sqnorms
from fastgrad.engine.plan import Site
from fastgrad.engine.tap import tap, tap_layer
from fastgrad.layers.choice import using
from fastgrad.layers.reduce import accumulate_dtype, sqnorm, upcast
from fastgrad.layers.registry import LayerRule, ReplayRule

Hook = Callable[[nn.Module, Any, Any, Any], Any]
PreHook = Callable[[nn.Module, Any, Any], None]


class Run:
    """The probes of one forward pass.

    Args:
        samples: B.
        impl: What the rules' operators run on.
    """

    def __init__(self, samples: int, impl: str = "auto") -> None:
        self.samples, self.impl = samples, impl
        #: Site and probe, in the order in which the forward pass reached them.
        self.probes: list[tuple[Site, Tensor]] = []
        self._inputs: dict[int, tuple[Any, Any]] = {}

    def _probe(self, site: Site, output: Tensor) -> Tensor:
        probe = torch.zeros(
            self.samples, len(site.parameters), dtype=accumulate_dtype(output), device=output.device
        ).requires_grad_()
        self.probes.append((site, probe))
        return probe

    def broadcast(self, site: Site, parameter: Tensor) -> Tensor:
        """One copy of a parameter per sample, in ``site.rank`` dimensions, whose gradient is each sample's own."""
        missing = site.rank - parameter.dim()
        shape = (1,) * missing + tuple(parameter.shape)
        copies = parameter.reshape(shape).expand(self.samples, *shape[1:])
        return tap([copies], [], self._probe(site, copies), _squares, in_place=False)[0]

    def layer_hook(self, site: Site, rule: LayerRule) -> Hook:
        """Forward hook for a module with a layer rule."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            value = args[0] if args else next(iter(kwargs.values()))
            layout = site.layout
            if layout.kind == "single":
                output = output.expand(self.samples, *output.shape[1:])
            elif output.shape[layout.dim] % self.samples:
                raise ValueError(
                    f"inputs must be laid out as in the first call: the output of {site.path!r} has shape "
                    f"{tuple(output.shape)}, which does not hold {self.samples} samples in dimension {layout.dim}"
                )
            norms = functools.partial(_layer_norms, site, rule, module, self.samples, self.impl)
            backward = None
            if layout.kind != "single" and _bypassable(module, value, output):
                backward = rule.input_gradient and rule.input_gradient(module, value)
            if backward is not None:
                return tap_layer(output, value, self._probe(site, output), norms, backward)
            in_place = rule.in_place and layout.kind != "single"
            return tap([output], [value], self._probe(site, output), norms, in_place=in_place)[0]

        return hook

    def replay_hooks(
        self, site: Site, original: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> tuple[PreHook, Hook]:
        """Forward pre-hook and forward hook for a module that is computed again in the backward pass."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Copied: the module may overwrite its inputs.
            self._inputs[id(module)] = pytree.tree_map_only(
                Tensor, lambda t: t.detach().clone(), (args, kwargs)
            )

        def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            leaves, spec = pytree.tree_flatten(self._inputs.pop(id(module)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            outputs, out_spec = pytree.tree_flatten(output)
            taken = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
            device = outputs[taken[0]].device.type
            autocast = (
                device,
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.bfloat16,
                torch.is_autocast_enabled(device),
            )

            def norms(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
                filled = list(rest)
                for place, tensor in zip(places, saved, strict=True):
                    filled[place] = tensor
                args, kwargs = pytree.tree_unflatten(filled, spec)
                if isinstance(site.rule, ReplayRule):
                    with using(self.impl):
                        return _columns(site, site.rule.function(module, args, kwargs, gradients))
                with torch.autocast(*autocast, cache_enabled=False):
                    return replay_sqnorms(
                        original, parameters, args, kwargs, site.batched, gradients, self.samples,
                        vectorize=site.vectorize,
                    )  # fmt: skip

            probe = self._probe(site, outputs[taken[0]])
            passed = tap([outputs[i] for i in taken], tensors, probe, norms, in_place=False)
            for place, tensor in zip(taken, passed, strict=True):
                outputs[place] = tensor
            return pytree.tree_unflatten(outputs, out_spec)

        return before, after


def _bypassable(module: nn.Module, value: Tensor, output: Tensor) -> bool:
    """Whether a rule's own backward pass may replace autograd's: it rounds once, and gives no parameter gradients."""
    return (
        output.dtype in (torch.float32, torch.float64)
        and value.dtype == output.dtype
        and not any(p.requires_grad for p in module.parameters(recurse=False))
    )


def _squares(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    (g,) = upcast(gradients[0])
    return sqnorm(g).unsqueeze(1)


def _columns(site: Site, norms: Any) -> Tensor:
    """A rule's answer as ``(B, m)``."""
    columns = [norms[name] for name in site.local]
    return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, 1)


def _layer_norms(
    site: Site,
    rule: LayerRule,
    module: nn.Module,
    samples: int,
    impl: str,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Tensor:
    a = site.layout.batch_first(saved[0], samples)
    g = site.layout.batch_first(gradients[0], samples)
    with using(impl):
        return _columns(site, rule.function(module, a, g))


def gather(
    run: Run, found: Sequence[Tensor], names: Sequence[str], like: Tensor, leading: tuple[int, ...] = ()
) -> Tensor:
    """Order the probes' gradients by parameter.

    Args:
        run: The forward pass.
        found: Gradient of each probe, ``(*leading, B, m)``.
        names: Wanted parameters; those no probe reports have gradient zero.
        like: Tensor that gives device and, without any probe, dtype.
        leading: Leading dimensions.

    Returns:
        ``(*leading, B, P)``.
    """
    dtype = accumulate_dtype(like)
    columns = [name for site, _ in run.probes for name in site.parameters]
    place = {name: i for i, name in enumerate(columns)}
    zeros = like.new_zeros((*leading, run.samples, 1), dtype=dtype)
    if not found:
        return zeros.expand(*leading, run.samples, len(names)).clone()
    parts = [f.to(device=like.device, dtype=dtype) for f in found]
    joined = torch.cat([*parts, zeros], -1)
    order = torch.tensor([place.get(name, len(columns)) for name in names], device=like.device)
    return joined.index_select(-1, order)
