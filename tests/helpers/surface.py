"""The public surface as text: modules, names, signatures, members of classes, options of commands.

``python tests/helpers/surface.py`` writes it to ``tests/data/public.json``: its difference is what a change
does to the interface. ``docs/reference/index.md`` says what may change when.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgrad.commands.cli import COMMANDS

RECORD = Path(__file__).parents[1] / "data" / "public.json"
#: Public modules; where names are given, those alone. Whatever is not listed here is internal.
MODULES: dict[str, tuple[str, ...] | None] = {
    "fastgrad": None,
    "fastgrad.blocks": None,
    "fastgrad.detector.report": ("Report",),
    "fastgrad.scores.one_class": ("Settings", "distance", "mixture", "plain"),
    "fastgrad.detector.price": ("Price",),
    "fastgrad.challenges": None,
    "fastgrad.checks": ("MissingExtraError",),
    "fastgrad.deploy.drift": None,
    "fastgrad.deploy.error_rate": ("ErrorRate", "error_rate"),
    "fastgrad.deploy.file.images": ("ImageError", "ImageTooLargeError", "decode_image"),
    "fastgrad.deploy.file.package": ("Description", "ModelPackage", "PackageError", "read_description"),
    "fastgrad.deploy.ray": None,
    "fastgrad.deploy.score": ("score",),
    "fastgrad.deploy.serve.app": ("create_app",),
    "fastgrad.gradients.check": ("Check",),
    "fastgrad.gradients.features": ("Route", "logits_of"),
    "fastgrad.interop": None,
    "fastgrad.layers": ("register_rule",),
    "fastgrad.losses": (
        "LOSSES", "REDUCTIONS", "TARGETS", "contrast_delta", "contrast_diagonal", "contrast_norms", "delta",
        "target_norms",
    ),
    "fastgrad.metrics": None,
    "fastgrad.plots": None,
    "fastgrad.prediction": ("Prediction",),
    "fastgrad.detector.model": ("Explanation",),
}  # fmt: skip


def names(module: ModuleType) -> list[str]:
    """The public names of a module: as listed, its ``__all__``, or what it defines without an underscore."""
    listed = MODULES[module.__name__]
    if listed is not None:
        return list(listed)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = (n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return sorted(name for name in own if not name.startswith("_"))


def text(value: Any, listed: list[Any]) -> str | dict[str, str]:
    """The signature of a function; of a class also those of its public members; of a constant its type.

    What a class has from another of those ``listed`` is not repeated.
    """
    if not isinstance(value, type):
        return _signature(value) if callable(value) else type(value).__name__
    found = {"": _signature(value)}
    bases = [base for base in value.__mro__[1:] if base in listed]
    inherited = {name for base in bases for name in (*dir(base), *inspect.get_annotations(base))}
    for cls in reversed(value.__mro__):
        if cls.__module__.partition(".")[0] != "fastgrad":
            continue
        fields = getattr(cls, "__annotations__", {})
        found |= {n: f": {_Bare(t)}" for n, t in fields.items() if not n.startswith("_")}
        for name, member in vars(cls).items():
            if name.startswith("_") and name != "__call__":
                continue
            member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if isinstance(member, property):
                found[name] = "property"
            elif inspect.isfunction(member):
                found[name] = _signature(member)
    return {name: shown for name, shown in found.items() if name not in inherited}


def surface() -> dict[str, Any]:
    """Everything public: by module the names and their text, and by command its options."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    found: dict[str, Any] = {}
    for module_name, module in modules.items():
        values = {name: getattr(module, name) for name in names(module)}
        listed = [value for value in values.values() if isinstance(value, type)]
        found[module_name] = {name: text(value, listed) for name, value in values.items()}
    for name, (module_name, _, _) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module_name).add_arguments(parser)
        actions = [a for a in parser._actions if a.help is not argparse.SUPPRESS and a.dest != "help"]
        found[f"fastgrad {name}"] = [" ".join(a.option_strings) or a.dest for a in actions]
    return found


class _Bare:
    """An annotation that shows without quotes: under ``from __future__ import annotations`` all are strings."""

    def __init__(self, annotation: Any) -> None:
        # A named tuple wraps its annotations.
        annotation = getattr(annotation, "__forward_arg__", annotation)
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        # An exception that takes what its builtin class takes.
        return "(...)"
    empty = inspect.Signature.empty
    parameters = [
        p if p.annotation is empty else p.replace(annotation=_Bare(p.annotation)) for p in signature.parameters.values()
    ]
    result = signature.return_annotation
    shown = signature.replace(parameters=parameters, return_annotation=empty if result is empty else _Bare(result))
    return re.sub(r" at 0x[0-9a-f]+", "", str(shown))


if __name__ == "__main__":
    RECORD.write_text(json.dumps(surface(), indent=1) + "\n")
