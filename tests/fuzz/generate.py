"""Programs by number: a tree of steps, what the model takes and returns, and calls of it; and their source text."""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass
from typing import Any

from tests.fuzz import steps


@dataclass(frozen=True)
class Step:
    """A step of a program: a row of `steps.LEAVES`, or one of `steps.WRAPPERS` around further steps."""

    kind: str
    inside: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model and calls of it, as rows of the tables and lines of source."""

    steps: tuple[Step, ...]
    calls: tuple[str, ...]
    ties: tuple[tuple[str, int, int], ...] = ()
    input: str = "features"
    head: str = "mean"
    output: str = "logits"
    options: str = ""
    seed: int = 0


def draw(seed: int) -> Program:
    """The program of an integer."""
    made = random.Random(seed)

    def some(depth: int, count: int, again: bool = False) -> tuple[Step, ...]:
        drawn = []
        for _ in range(count):
            if depth < 2 and made.random() < 0.4:
                kind = made.choice(list(steps.WRAPPERS))
                drawn.append(Step(kind, some(depth + 1, made.randint(1, 2), again or kind == "checkpoint")))
            else:
                kind = made.choice(list(steps.LEAVES))
                # A checkpoint that computes again from a state that forward has changed is wrong in PyTorch, too.
                drawn.append(Step("tanh" if again and kind == "state" else kind))
        return tuple(drawn)

    def call() -> str:
        if made.random() < 0.3:
            return steps.ACTIONS[made.choice(list(steps.ACTIONS))]
        api = made.choice(["record", "record", "features", "features", "clip", "clip"])
        api = made.choice(["submodule", "threads"]) if made.random() < 0.06 else api
        options: dict[str, Any] = {"B": made.choice([1, 2, 3, 4, 5, 5, 6]), "T": made.choice([1, 2, 3, 4])}
        if made.random() < 0.03:
            options["B"] = 0
        options |= {"mode": made.choice("ab"), "depth": made.choice([0, 1, 2, 3])}
        options |= {"big": made.random() < 0.3, "mask": made.random() < 0.2}
        if api == "record" and made.random() < 0.2:
            options["batched"] = True
        return f"session.{api}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    ties = [(made.choice(list(steps.TIES)), made.randrange(9), made.randrange(9))]
    options = ["loss='bce'", "loss='mse'", "loss='cross_entropy'", "loss='bce', chunk=2"]
    return Program(
        steps=some(0, made.randint(1, 4)),
        calls=tuple(call() for _ in range(made.randint(2, 5))),
        ties=tuple(ties if made.random() < 0.25 else ()),
        input=made.choice(list(steps.INPUTS)),
        head=made.choice(list(steps.HEADS)),
        output=made.choice(list(steps.OUTPUTS)),
        options=made.choice(options),
        seed=seed,
    )


def source(program: Program) -> str:
    """The program's model and calls as source text."""
    classes: list[str] = []
    linears: list[str] = []

    def block(inside: tuple[Step, ...], path: str) -> tuple[str, str]:
        init, forward = [], []
        for i, step in enumerate(inside):
            name, within = f"s{i}", f"{path}.s{i}"
            if not step.inside:
                row = steps.LEAVES[step.kind]
                if "self.{n} = nn.Linear(4, 4)" in row[0]:
                    linears.append(within)
            else:
                row = steps.WRAPPERS[step.kind]
                kind = "Block" + within.removeprefix("self").replace(".", "")
                own = block(step.inside, within)
                classes.append(
                    f"class {kind}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                    f"{textwrap.indent(own[0], ' ' * 8)}\n    def forward(self, h, c):\n        B, T, _ = h.shape\n"
                    f"{textwrap.indent(own[1], ' ' * 8)}\n        return h\n"
                )
                init.append(f"self.{name} = {kind}()")
            words = {"n": name, "b": name, "call": f"self.{name}(h, c)"}
            init += [row[0].format(**words)] if row[0] else []
            forward.append(row[1].format(**words))
        return "\n".join(init or ["pass"]), "\n".join(forward or ["pass"])

    own = block(program.steps, "self")
    ties = [
        steps.TIES[kind].format(a=linears[a % len(linears)], b=linears[b % len(linears)])
        for kind, a, b in program.ties
        if linears
    ]
    begin, end = steps.INPUTS[program.input], steps.HEADS[program.head]
    init = "\n".join(filter(None, [begin[0], own[0], end[0], *ties]))
    forward = "\n".join(filter(None, [begin[1], own[1], end[1], steps.OUTPUTS[program.output]]))
    return (
        "".join(f"{c}\n\n" for c in classes)
        + "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + textwrap.indent(init, " " * 8)
        + "\n\n    def forward(self, x, mode='a', depth=1, mask=None):\n        B, T = x.shape[:2]\n"
        + "        mask = torch.zeros(T, T).bool() if mask is None else mask\n"
        + "        c = {'mode': mode, 'depth': depth, 'big': bool((x > 5).any()), 'mask': mask}\n"
        + textwrap.indent(forward, " " * 8)
        + f"\n\n\ntorch.manual_seed({program.seed})\n"
        + f"session = Session(Model().double(), tokens={'tokens' in program.input}, {program.options})\n"
        + "".join(f"{line}\n" for line in program.calls)
    )
