"""Import paths of version 0.1 lead to the modules where they lie."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fastgrad
from fastgrad._moved import MOVED


@pytest.mark.parametrize("old", sorted(set(MOVED) - {"serving"}))
def test_old_path_leads_to_the_same_module_with_a_warning(old: str) -> None:
    sys.modules.pop(f"fastgrad.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"fastgrad.{old} has moved to fastgrad.{MOVED[old]}"):
        found = importlib.import_module(f"fastgrad.{old}")
    assert found is importlib.import_module(f"fastgrad.{MOVED[old]}")
    assert found.__spec__.name == f"fastgrad.{MOVED[old]}"


def test_modules_of_a_moved_package_are_not_loaded_twice() -> None:
    for name in ("fastgrad.serving", "fastgrad.serving.requests"):
        sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match="fastgrad.serving"):
        found = importlib.import_module("fastgrad.serving.requests")
    assert found is importlib.import_module("fastgrad.deploy.serve.requests")


def test_the_function_export_stays_what_it_is() -> None:
    importlib.import_module("fastgrad.deploy.export")
    assert callable(fastgrad.export)


def test_unknown_paths_stay_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fastgrad\.nowhere"):
        importlib.import_module("fastgrad.nowhere")


def test_import_loads_no_room_it_does_not_need() -> None:
    code = "import sys, fastgrad; print([m for m in sys.modules if m.startswith('fastgrad.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for room in ("engine", "layers", "scores", "blocks", "estimators", "challenges", "deploy", "commands"):
        assert f"fastgrad.{room}" not in loaded
    assert "fastgrad.functional" in loaded
