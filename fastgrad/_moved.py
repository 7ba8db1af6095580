"""Import paths of version 0.1, kept for one release: each leads to where its module lies, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "bench_command": "commands.bench",
    "cli": "commands.cli",
    "demo": "commands.demo",
    "distributed": "deploy.score.ray",
    "doctor": "commands.doctor",
    "drift": "deploy.drift",
    "estimators.conformal": "scores.conformal",
    "estimators.fitted": "scores.fitted",
    "estimators.oneclass": "scores",
    "estimators.preprocessing": "scores.rows",
    "estimators.scoring": "estimators.combined",
    "extraction": "blocks.extraction",
    "image_statistics": "blocks.image_statistics",
    "images": "deploy.images",
    "layers.fallback": "engine.fallback",
    "layers.network": "engine.network",
    "layers.plan": "engine.planning",
    "layers.redirect": "engine.redirect",
    "layers.run": "engine.run",
    "layers.shadow": "engine.shadow",
    "layers.tap": "engine.tap",
    "layers.tracing": "engine.tracing",
    "package": "deploy.package",
    "score": "deploy.score.local",
    "scoring": "deploy.score.job",
    "serving": "deploy.serve",
    "unroll": "deploy.graph",
}


class _Alias(Loader):
    """Hands out the module that stands elsewhere, unchanged."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.target)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has written the alias's specification over the module's own.
        module.__spec__ = self.own


class MovedFinder(MetaPathFinder):
    """Finds the modules of `MOVED` and everything below them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The alias of a moved module, or None."""
        package, _, name = fullname.partition(".")
        if package != "fastgrad":
            return None
        for old, new in MOVED.items():
            if name == old or name.startswith(old + "."):
                found = f"fastgrad.{new}{name[len(old) :]}"
                warnings.warn(
                    f"fastgrad.{name} has moved to {found}; the old path goes with version 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return ModuleSpec(fullname, _Alias(found), is_package=True)
        return None
