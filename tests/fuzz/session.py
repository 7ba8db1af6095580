"""Calls of a model, each held against the loop of `tests.fuzz.loop`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad
from tests.fuzz import loop
from tests.fuzz.loop import InvalidError, RefusedError, WrongError

# A refusal names the argument and what it must be; some RuntimeErrors are documented.
REFUSALS = re.compile(
    r"^\w+(\[.*?\])? must |^params must |in another way than|"
    r"outputs must be computed from calls|must be called once|use_reentrant=False"
)


class Session:
    """A model, in training mode and float64, and calls of it; if ``tokens``, it takes indices.

    ``loss`` and ``chunk`` are `GradientFeatures`' loss and chunk_size.
    """

    def __init__(self, model: nn.Module, *, tokens: bool, loss: str = "bce", chunk: int | None = None) -> None:
        self.model, self.tokens, self.loss, self.chunk = model, tokens, loss, chunk
        self.extractor: fastgrad.GradientFeatures | None = None
        self.calls = 0

    # What happens between calls.

    def step(self) -> None:
        """Change the parameters in place, as an optimizer does."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(0.9).add_(0.01)

    def switch(self) -> None:
        """Turn over every attribute that a branch looks at."""
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if name.startswith("on"):
                    setattr(module, name, not value)

    def freeze(self) -> None:
        """Turn over ``requires_grad`` of every second parameter."""
        for p in list(self.model.parameters())[::2]:
            p.requires_grad_(not p.requires_grad)

    def replace(self) -> None:
        """Put a new layer in the place of the first linear one."""
        for module in self.model.modules():
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    new = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    setattr(module, name, new.to(child.weight))
                    return

    # Calls.

    def inputs(self, B: int, T: int, mode: str, depth: int, big: bool, mask: bool) -> dict[str, Any]:
        self.calls += 1
        made = torch.Generator().manual_seed(self.calls)
        dtype = next((p.dtype for p in self.model.parameters()), torch.float64)
        x = torch.randint(6, (B, T), generator=made) if self.tokens else torch.randn(B, T, 4, generator=made)
        if big and B:
            x[-1, -1] += 6 - x[-1, -1]
        given: dict[str, Any] = {"x": x if self.tokens else x.to(dtype), "mode": mode, "depth": depth}
        return given | {"mask": torch.ones(T, T).triu(1).bool()} if mask else given

    def run(self, call: Callable[[], Any], after: dict[str, Any], before: dict[str, Any], inputs: Any) -> Any:
        """The answer of the package, or its refusal; the model must be as ``after``, or untouched where it refused."""
        wide = loop.widened(self.model, inputs)
        torch.manual_seed(self.calls)
        allowed = [after]
        try:
            return call()
        except (TypeError, ValueError, RuntimeError) as error:
            allowed.append(before)
            if REFUSALS.search(str(error)):
                raise RefusedError from error
            raise WrongError(f"foreign {type(error).__name__}: {error}") from error
        except Exception as error:
            raise WrongError(f"foreign {type(error).__name__}: {error}") from error
        finally:
            self.model.zero_grad()
            now = loop.state(self.model)
            if not any(loop.alike(now, other) for other in allowed):
                loop.require_independence(*wide)  # else the batch does not write what its samples do
                other = allowed[-1]
                names = [n for n in now.keys() | other.keys() if not loop.alike(now.get(n), other.get(n))]
                raise WrongError(f"the model was changed: {names[0]}")

    def draws(self, after: Tensor) -> bool:
        """Whether a call that leaves the random numbers so has drawn any."""
        return not torch.equal(torch.Generator().manual_seed(self.calls).get_state(), after)

    def compare(self, what: str, found: Tensor, true: Tensor, inputs: dict[str, Any], drawn: Tensor, out: Any) -> None:
        """Compare norms, unless random numbers, which samples draw in another order, choose the functions to call."""
        try:
            loop.compare(what, found, true, loop.floats(out)[0].dtype)
        except WrongError as error:
            if self.draws(drawn) and len(loop.ways(self.model, inputs)) > 1:
                raise InvalidError("random numbers choose what the model computes") from error
            raise

    def same_output(self, found: Any, expected: Any, drawn: Tensor) -> None:
        """Compare outputs; which sample gets which random number is not promised."""
        random = self.draws(drawn)
        try:
            loop.same_output(found, expected, exact=random)
        except WrongError as error:
            if not random:
                raise
            raise InvalidError("samples drew other random numbers than in an ordinary call") from error

    def record(self, *, B: int, T: int, batched: bool = False, **options: Any) -> None:
        """Squared norms of every parameter, of a loss on all that the model returns."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        output, after, drawn, rows = loop.truth(self.model, inputs, loop.losses_of, self.calls)
        parameters = list(self.model.parameters())

        def call() -> Any:
            with fastgrad.record(self.model):
                out = self.model(**inputs)
                losses = loop.losses_of(out, B)
                if not batched:
                    return out, torch.stack(fastgrad.grad_sqnorm(losses.sum(), parameters), -1)
                both = torch.stack([torch.ones_like(losses), -2 * torch.ones_like(losses)])
                found = fastgrad.grad_sqnorm(losses, parameters, grad_outputs=both, is_grads_batched=True)
                return out, torch.stack(found, -1)

        out, found = self.run(call, loop.state(after), before, inputs)
        if not torch.equal(torch.get_rng_state(), drawn):
            raise WrongError("other random numbers were drawn than without the package")
        self.same_output(out, output, drawn)
        true = loop.squared(rows, len(parameters))
        for i, factor in enumerate([1, 4] if batched else [1]):
            self.compare("norms", found[i] if batched else found, factor * true, inputs, drawn, out)

    def features(self, *, B: int, T: int, **options: Any) -> None:
        """`GradientFeatures`, of one extractor for all calls."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        pieces = inputs["x"].split(self.chunk or max(B, 1))
        parts = [loop.truth(self.model, inputs | {"x": x}, self.ones, self.calls, evaluate=True) for x in pieces]

        def call() -> Any:
            if self.extractor is None:
                self.extractor = fastgrad.GradientFeatures(self.model, loss=self.loss, chunk_size=self.chunk)
            return self.extractor(**inputs)

        logits, features = self.run(call, before, before, inputs)
        loop.same_output(logits, torch.cat([loop.floats(part[0])[0] for part in parts]))
        if features.requires_grad or logits.requires_grad:
            raise WrongError("features carry a graph")
        rows = [row for part in parts for row in part[3]]
        loop.compare("features", features, loop.squared(rows, features.shape[1]), logits.dtype)

    def ones(self, output: Any, _: int) -> Tensor:
        """The losses of `GradientFeatures`."""
        return loop.ones_losses(self.loss, loop.floats(output)[0])

    def clip(self, *, B: int, T: int, **options: Any) -> None:
        """Clipped gradients, at the middle of the samples' norms."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        output, after, drawn, rows = loop.truth(self.model, inputs, loop.losses_of, self.calls, trainable=True)
        norms = loop.squared(rows, len(rows[0]) if rows else 0).sum(1).sqrt()
        limit = float(norms.median()) or 1.0 if B else 1.0

        def call() -> Any:
            with fastgrad.clip_gradients(self.model, limit) as clipped:
                out = self.model(**inputs)
                norms = clipped.backward(loop.losses_of(out, B))
                return out, norms, [p.grad for p in self.model.parameters() if p.requires_grad]

        out, found, grads = self.run(call, loop.state(after), before, inputs)
        dtype = loop.floats(out)[0].dtype
        self.same_output(out, output, drawn)
        self.compare("clipped norms", found.square(), norms.square(), inputs, drawn, out)
        factors = (limit / norms).clamp(max=1).tolist()
        scale = sum(factor * norm for factor, norm in zip(factors, norms.tolist(), strict=True))
        for column, grad in enumerate(grads):
            zero = torch.zeros((), dtype=torch.float64)
            total = sum((f * row[column] for f, row in zip(factors, rows, strict=True)), zero)
            error = (total if grad is None else grad.double() - total).norm()
            if not error <= loop.tolerance(dtype) * scale + 1e5 * torch.finfo(dtype).eps:
                raise WrongError("clipped gradients are off")
