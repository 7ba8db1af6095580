"""Imports run in one direction: a package imports only what stands above it here, and no modules form a circle.

PyTorch's private names stand in one module, where a release that changes one can be met.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastgrad

ROOT = Path(fastgrad.__file__).parent
ORDER = [
    "_torch", "atomic", "checks", "version", "kernels", "losses", "ops", "layers", "batches", "prediction", "memory",
    "evaluation", "engine", "gradients", "scores", "blocks", "challenges", "metrics", "introspection", "plots",
    "detector", "interop", "deploy", "commands", "__main__",
]  # fmt: skip
#: What these may import of anything but the standard library.
ALONE = {"kernels": {"triton", "fastgrad"}, "losses": {"torch"}}


def modules() -> dict[str, ast.Module]:
    """Return every module of the package, parsed."""
    # A link, into which no search goes.
    found = {*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")}
    files = {".".join(("fastgrad", *f.relative_to(ROOT).with_suffix("").parts)): f for f in found}
    return {name.removesuffix(".__init__"): ast.parse(file.read_text()) for name, file in files.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports: at its top, within functions, and for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module: str) -> str:
    """Return the part of the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


MODULES = modules()
GRAPH = {
    name: {other if other in MODULES else other.rpartition(".")[0] for other in imported(tree)} & set(MODULES)
    for name, tree in MODULES.items()
}


def test_every_part_of_the_package_has_its_place() -> None:
    assert {package(name) for name in MODULES} == {*ORDER, "__init__"}


def test_imports_run_in_one_direction() -> None:
    # The package's own module gives all public names, and `fastgrad.something` in a function is asked for there.
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others - {"fastgrad"}
        if name != "fastgrad" and ORDER.index(package(other)) > ORDER.index(package(name))
    ]
    assert upward == []


def test_no_modules_form_a_circle() -> None:
    rest = {name: others - {name, "fastgrad"} for name, others in GRAPH.items() if name != "fastgrad"}
    while free := {name for name, others in rest.items() if not others & rest.keys()}:
        rest = {name: others for name, others in rest.items() if name not in free}
    assert rest == {}


def test_kernels_and_losses_stand_alone() -> None:
    for part, allowed in ALONE.items():
        for name, tree in MODULES.items():
            if package(name) == part:
                found = {other.partition(".")[0] for other in imported(tree)}
                assert found & {"triton", "torch", "numpy", "fastgrad"} <= allowed, name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.expr) -> str:
    """A name with its dots; empty for an attribute of anything else, as of a call's result."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.AST) -> Iterator[str]:
    """What a module imports of torch, or takes from it as an attribute, under a private name."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        for name in names:
            parts = name.split(".")
            # ATen's operators are no private names, whatever they are called.
            if parts[0] in ("torch", "nn") and parts[1:2] != ["ops"] and any(map(is_private, parts)):
                yield name


def test_private_names_of_pytorch_stand_in_one_module() -> None:
    found = {name: sorted(set(private_names(tree))) for name, tree in MODULES.items()}
    assert found.pop("fastgrad._torch")
    assert {name: names for name, names in found.items() if names} == {}
