"""A running server for each kind of file, shared by all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_client import Server, running

from fastgrad.deploy.file.package import ModelPackage

for needed in ("fastapi", "uvicorn", "pebble", "prometheus_client", "PIL"):
    pytest.importorskip(needed)


@pytest.fixture(scope="session")
def servers(
    tiny_package: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Server, Path]]]:
    temporary = tmp_path_factory.mktemp("served")
    # A busy machine may need longer for a new process than the 30 seconds of the default.
    options, env = ("--timeout", "120"), {"TMPDIR": str(temporary)}
    with running(tiny_package, *options, env=env) as compiled, running(tiny_onnx, *options, env=env) as onnx:
        yield {"pt2": (compiled, tiny_package), "onnx": (onnx, tiny_onnx)}
        assert all(path.name.startswith("fastgrad-serve-") for path in temporary.iterdir())
    assert compiled.process.returncode == onnx.process.returncode == 0
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="session", params=["pt2", "onnx"])
def served(request: pytest.FixtureRequest, servers: dict[str, tuple[Server, Path]]) -> tuple[Server, Path]:
    """A server and its file, of each kind: what holds for one must hold for all."""
    return servers[request.param]


@pytest.fixture(scope="session")
def server(served: tuple[Server, Path]) -> Server:
    return served[0]


@pytest.fixture(scope="session")
def package(served: tuple[Server, Path]) -> ModelPackage:
    """The same file, run directly."""
    return ModelPackage(served[1])
