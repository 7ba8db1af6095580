"""One server for all tests that need a running one: it holds a file of each kind, and one that explains itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serve_client import Server, running

from fastgrad.deploy.file.package import ModelPackage


@dataclass
class Named:
    """One of the server's models."""

    server: Server
    name: str
    file: Path

    def predict(self, body: Any, content_type: str, **headers: str) -> tuple[int, Any]:
        return self.server.predict(body, content_type, path=f"/predict/{self.name}", **headers)

    def metric(self, name: str) -> float:
        return self.server.metric(name, f"/metrics/{self.name}")


@pytest.fixture(scope="session")
def shared(
    tiny_package: Path, tiny_onnx: Path, tiny_explained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Named]]:
    """The models by name: ``pt2``, ``onnx``, ``explained``."""
    folder = tmp_path_factory.mktemp("served")
    files = {"pt2": tiny_package, "onnx": tiny_onnx, "explained": tiny_explained}
    copies = {name: folder / f"{name}{file.suffix}" for name, file in files.items()}
    named = []
    for name, file in files.items():
        shutil.copyfile(file, copies[name])
        named += ["--model", f"{name}={copies[name]}"]
    with running(None, *named, probe=folder / "pauses") as server:
        yield {name: Named(server, name, copy) for name, copy in copies.items()}
    assert server.process.returncode == 0


@pytest.fixture(scope="session", params=["pt2", "onnx"])
def served(request: pytest.FixtureRequest, shared: dict[str, Named]) -> Named:
    """A model of each kind, one after the other: what holds for one must hold for all."""
    return shared[request.param]


@pytest.fixture(scope="session")
def package(served: Named) -> ModelPackage:
    """The same file, run directly."""
    return ModelPackage(served.file)
