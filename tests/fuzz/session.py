"""Calls of a model, each held against the loop of `tests.fuzz.loop`."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad
from tests.fuzz import loop
from tests.fuzz.loop import RefusedError, WrongError

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

    def vary(self) -> None:
        """Change the values that a user anneals: weights of terms, which are zero at first."""
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if name.startswith("value"):
                    setattr(module, name, {0.0: 0.5, 0.5: 1.0, 1.0: 0.0}[value])

    def zero(self) -> None:
        """Set every third parameter to zero."""
        with torch.no_grad():
            for p in list(self.model.parameters())[::3]:
                p.zero_()

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

    def run(self, call: Callable[[], Any], after: list[dict[str, Any]], before: dict[str, Any]) -> Any:
        """The answer of the package, or its refusal, after which the model must be as ``before``.

        An answer leaves it as each sample does, ``after``; if they leave different models, only a refusal is right.
        """
        torch.manual_seed(self.calls)
        refused = False
        try:
            return call()
        except (TypeError, ValueError, RuntimeError) as error:
            refused = True
            if REFUSALS.search(str(error)):
                raise RefusedError from error
            raise WrongError(f"foreign {type(error).__name__}: {error}") from error
        except Exception as error:
            refused = True
            raise WrongError(f"foreign {type(error).__name__}: {error}") from error
        finally:
            self.model.zero_grad()
            now = loop.state(self.model)
            # What fails in a backward pass leaves what its forward pass wrote.
            allowed = [before, *after[:1]] if refused else after
            if refused and not after:  # it drew what it wrote
                allowed = [now]
            differing = [other for other in allowed if not loop.alike(now, other)]
            if len(differing) == len(allowed) if refused else differing:
                other = differing[0]
                names = [n for n in now.keys() | other.keys() if not loop.alike(now.get(n), other.get(n))]
                raise WrongError(f"the model was changed{' by a refused call' * refused}: {names[0]}")

    def record(self, *, B: int, T: int, batched: bool = False, **options: Any) -> None:
        """Squared norms of every parameter, of a loss on all that the model returns."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        output, after, draws, rows = loop.truth(self.model, inputs, loop.losses_of, self.calls)
        parameters = list(self.model.parameters())

        def call() -> Any:
            with fastgrad.record(self.model):
                out = self.model(**inputs)
                losses = loop.losses_of(out, B)
                given = losses.sum() if self.calls % 2 else losses
                if not batched:
                    found = torch.stack(fastgrad.grad_sqnorm(given, parameters, retain_graph=draws), -1)
                else:
                    both = torch.stack([torch.ones_like(losses), -2 * torch.ones_like(losses)])
                    found = torch.stack(
                        fastgrad.grad_sqnorm(
                            losses, parameters, grad_outputs=both, is_grads_batched=True, retain_graph=draws
                        ), -1,
                    )  # fmt: skip
                own = [loop.gradients_of(loss, parameters) for loss in losses] if draws and B else rows
                return out, found, own

        out, found, own = self.run(call, [] if draws else list(map(loop.state, after)), before)
        if not draws:
            if not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(self.calls).get_state()):
                raise WrongError("random numbers were drawn")
            loop.same_output(out, output)
        true = loop.squared(own, len(parameters))
        if draws:  # of the graph that was recorded, which has gradients of trainable parameters alone
            kept = [i for i, p in enumerate(parameters) if p.requires_grad]
            found, true = found[..., kept], true[:, kept]
        for i, factor in enumerate([1, 4] if batched else [1]):
            loop.compare("norms", found[i] if batched else found, factor * true, loop.floats(out)[0].dtype)

    def features(self, *, B: int, T: int, **options: Any) -> None:
        """`GradientFeatures`, of one extractor for all calls."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        output, _, draws, rows = loop.truth(self.model, inputs, self.ones, self.calls, evaluate=True)

        def call() -> Any:
            if self.extractor is None:
                self.extractor = fastgrad.GradientFeatures(self.model, loss=self.loss, chunk_size=self.chunk)
            return self.extractor(**inputs)

        logits, features = self.run(call, [before], before)
        if features.requires_grad or logits.requires_grad:
            raise WrongError("features carry a graph")
        if not draws:
            loop.same_output(logits, loop.floats(output)[0])
            loop.compare("features", features, loop.squared(rows, features.shape[1]), logits.dtype)

    def ones(self, output: Any, _: int) -> Tensor:
        """The losses of `GradientFeatures`."""
        return loop.ones_losses(self.loss, loop.floats(output)[0])

    def clip(self, *, B: int, T: int, **options: Any) -> None:
        """Clipped gradients, at the middle of the samples' norms; what accumulates keeps within the bound."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return
        output, after, draws, rows = loop.truth(self.model, inputs, loop.losses_of, self.calls, trainable=True)
        norms = loop.squared(rows, len(rows[0]) if rows else 0).sum(1).sqrt()
        # What vanishes in exact arithmetic is rounding, and no bound holds below it.
        least = 0.1 * min(1e9 * torch.finfo(loop.floats(output)[0].dtype).eps, 1e-2)
        limit = max(float(norms.median()), least) if B else 1.0

        def call() -> Any:
            with fastgrad.clip_gradients(self.model, limit) as clipped:
                out = self.model(**inputs)
                losses = loop.losses_of(out, B)
                own = [loop.gradients_of(loss, trained) for loss in losses] if draws and B else rows
                return out, clipped.backward(losses), [p.grad for p in trained], own

        out, found, grads, rows = self.run(call, [] if draws else list(map(loop.state, after)), before)
        dtype = loop.floats(out)[0].dtype
        norms = loop.squared(rows, len(trained)).sum(1).sqrt()
        if not draws:
            loop.same_output(out, output)
        loop.compare("clipped norms", found.square(), norms.square(), dtype)
        total = sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5
        if not total <= B * limit * (1 + loop.tolerance(dtype)):
            raise WrongError(f"clipped gradients have norm {total:.3g} above their bound {B * limit:.3g}")
        factors = (limit / norms).clamp(max=1).tolist()
        scale = sum(factor * norm for factor, norm in zip(factors, norms.tolist(), strict=True))
        for column, grad in enumerate(grads):
            zero = torch.zeros((), dtype=torch.float64)
            whole = sum((f * row[column].double() for f, row in zip(factors, rows, strict=True)), zero)
            error = (whole if grad is None else grad.double() - whole).norm()
            if not error <= loop.tolerance(dtype) * scale + 1e5 * torch.finfo(dtype).eps:
                raise WrongError("clipped gradients are off")

    def submodule(self, *, B: int, T: int, **_: Any) -> None:
        """Norms of a call of the last layer alone."""
        head = getattr(self.model, "head", None)
        if not isinstance(head, nn.Linear) or not B:
            return
        self.calls += 1
        before, made = loop.state(self.model), torch.Generator().manual_seed(self.calls)
        x, parameters = torch.randn(B, T, 4, generator=made).to(head.weight.dtype), list(head.parameters())

        def losses(x: Tensor) -> Tensor:
            return head(x).square().sum((1, 2))

        double = nn.Linear(4, 3).double()
        double.load_state_dict(head.state_dict())
        rows = [loop.gradients_of(double(row.double()).square().sum(), list(double.parameters())) for row in x.split(1)]

        def call() -> Tensor:
            with fastgrad.record(self.model):
                return torch.stack(fastgrad.grad_sqnorm(losses(x), parameters), -1)

        found = self.run(call, [before], before)
        loop.compare("norms of a layer", found, loop.squared(rows, 2), head.weight.dtype)

    def threads(self, *, B: int, T: int, **options: Any) -> None:
        """Norms from two threads at once, of a model that writes and draws nothing."""
        inputs, before = self.inputs(B, T, **options), loop.state(self.model)
        _, after, draws, rows = loop.truth(self.model, inputs, loop.losses_of, self.calls)
        stateful = any(name.startswith("state") for module in self.model.modules() for name in vars(module))
        if draws or stateful or not B or not all(loop.alike(loop.state(left), before) for left in after):
            return
        parameters = list(self.model.parameters())

        def norms(_: int) -> Tensor:
            with fastgrad.record(self.model):
                return torch.stack(fastgrad.grad_sqnorm(loop.losses_of(self.model(**inputs), B), parameters), -1)

        def call() -> Any:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(norms, range(2)))

        for found in self.run(call, [before], before):
            loop.compare("norms in threads", found, loop.squared(rows, len(parameters)), found.dtype)
