"""One server for all tests that need a running one: it holds a file of each kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serve_client import Server, running

from fastgrad.deploy.file.package import ModelPackage

for needed in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "PIL"):
    pytest.importorskip(needed)


@dataclass
class Named:
    """One of the server's models, and the folder of the server's temporary files."""

    server: Server
    name: str
    file: Path
    temporary: Path

    def predict(self, body: Any, content_type: str, **headers: str) -> tuple[int, Any]:
        return self.server.predict(body, content_type, path=f"/predict/{self.name}", **headers)

    def metric(self, name: str) -> float:
        return self.server.metric(name, f"/metrics/{self.name}")


@pytest.fixture(scope="session")
def shared(tiny_package: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Named]]:
    """The models by name: ``pt2``, ``onnx``."""
    folder = tmp_path_factory.mktemp("served")
    (temporary := folder / "temporary").mkdir()
    files = [shutil.copyfile(file, folder / f"{file.suffix[1:]}{file.suffix}") for file in (tiny_package, tiny_onnx)]
    options = [part for file in files for part in ("--model", f"{file.stem}={file}")]
    # A busy machine may need longer for a new process than the 30 seconds of the default.
    options += ["--timeout", "120"]
    with running(None, *options, probe=folder / "pauses", env={"TMPDIR": str(temporary)}) as server:
        yield {file.stem: Named(server, file.stem, file, temporary) for file in files}
    assert server.process.returncode == 0
    assert not list(temporary.iterdir())


@pytest.fixture(scope="session", params=["pt2", "onnx"])
def served(request: pytest.FixtureRequest, shared: dict[str, Named]) -> Named:
    """A model of each kind, one after the other: what holds for one must hold for all."""
    return shared[request.param]


@pytest.fixture(scope="session")
def package(served: Named) -> ModelPackage:
    """The same file, run directly."""
    return ModelPackage(served.file)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of tests that are coroutines."""
    return "asyncio"
