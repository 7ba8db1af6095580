"""PyTorch's private names stand in one module, where a release that changes one can be met."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import fastgrad

ROOT = pathlib.Path(fastgrad.__file__).parent


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
    found = {
        str(file.relative_to(ROOT)): sorted(set(private_names(ast.parse(file.read_text()))))
        for file in ROOT.rglob("*.py")
    }
    assert found.pop("_torch.py")
    assert {file: names for file, names in found.items() if names} == {}
