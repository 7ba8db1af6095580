"""Another file takes over without a request lost; a broken one changes nothing, and the log says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deploy_models import TinyTwoStage, write_archive
from onnx_needed import WARNINGS, skip_without_onnx
from serve_client import Server, image, running, wait_for

from fastgrad.deploy.file.export import export
from fastgrad.deploy.file.opening import digest_of
from fastgrad.deploy.file.package import Description, PackageError
from fastgrad.deploy.serve.app import create_app

skip_without_onnx()
pytestmark = [*WARNINGS, pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="reloads on SIGHUP")]


class Reloading(NamedTuple):
    server: Server
    file: Path
    temporary: Path

    def hup(self, logged: str) -> None:
        """SIGHUP, and wait for a line of the log."""
        before = self.server.log.count(logged)
        self.server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.server.log.count(logged) > before, 60)

    def names(self) -> list[str]:
        """The classes of the file that answers."""
        return [str(self.server.predict(image(seed))[1]["label"]) for seed in range(4)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another file, whose classes have other names."""
    file = tmp_path_factory.mktemp("other") / "other.onnx"
    return export(TinyTwoStage(), torch.zeros(1, 3, 8, 8), file, labels=list("abcd"), mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def started(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloading]:
    folder = tmp_path_factory.mktemp("reloading")
    (temporary := folder / "temporary").mkdir()
    file = shutil.copyfile(tiny_onnx, folder / "model.onnx")
    with running(file, env={"TMPDIR": str(temporary)}) as server:
        yield Reloading(server, file, temporary)
    assert list(temporary.iterdir()) == []


@pytest.fixture
def reloading(started: Reloading, tiny_onnx: Path) -> Reloading:
    """A server that answers from a file of its own, whatever other tests left there."""
    started.file.unlink(missing_ok=True)
    shutil.copyfile(tiny_onnx, started.file)
    started.hup("was loaded" if set(started.names()) <= set("abcd") else "is what it was")
    wait_for(lambda: len(started.server.processes) == len(list(started.temporary.iterdir())) == 1)
    return started


def test_new_file_takes_over(reloading: Reloading, other: Path) -> None:
    before = [reloading.server.metric(f"fastgrad_model_{name}") for name in ("reloads", "reload_failures")]
    scores = reloading.server.metric("fastgrad_drift_scores")
    assert set(reloading.names()) <= {"cat", "dog", "cow", "hen"}
    reloading.hup("is what it was")  # with the drift monitor's state
    assert reloading.server.metric("fastgrad_drift_scores") == scores + 4
    shutil.copyfile(other, reloading.file)
    # Nothing is loaded before it is asked for, even if a process must be replaced.
    (pid,) = reloading.server.processes
    os.kill(pid, signal.SIGKILL)
    assert set(reloading.names()) <= {"cat", "dog", "cow", "hen"}
    reloading.hup("was loaded")
    assert set(reloading.names()) <= set("abcd")
    after = [reloading.server.metric(f"fastgrad_model_{name}") for name in ("reloads", "reload_failures")]
    assert after == [before[0] + 1, before[1]]
    wait_for(lambda: len(reloading.server.processes) == len(list(reloading.temporary.iterdir())) == 1)


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "No such file or directory"),
    "cut off": (lambda path: os.truncate(path, 1000), "not a readable"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is no regular file"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "it is no regular file"),
    "2 GiB of nothing": (lambda path: os.truncate(path, 2**31), "it has 2147483648 bytes or more"),
}


def test_broken_file_changes_nothing(reloading: Reloading, tiny_onnx: Path) -> None:
    failures = reloading.server.metric("fastgrad_model_reload_failures")
    for number, (break_it, reason) in enumerate(BREAK.values(), 1):
        break_it(reloading.file)
        reloading.hup("the model stays as it was")
        said = reloading.server.log.splitlines()[-1]
        assert re.search(rf"stays as it was: {reloading.file} (cannot be loaded: |is ){reason}", said)
        assert set(reloading.names()) <= {"cat", "dog", "cow", "hen"}
        assert reloading.server.metric("fastgrad_model_reload_failures") == failures + number
        reloading.file.unlink(missing_ok=True)
        shutil.copyfile(tiny_onnx, reloading.file)
    assert "fastgrad-serve" not in reloading.server.log


def test_copy_that_the_system_removed(reloading: Reloading) -> None:
    """Cleaners of temporary files remove what is some days old: the file is copied again where it is needed."""
    for asked in (True, False):
        (copy,) = reloading.temporary.glob("fastgrad-serve-*")
        shutil.rmtree(copy)
        if asked:
            reloading.hup("was loaded")
        else:
            (pid,) = reloading.server.processes
            os.kill(pid, signal.SIGKILL)
        assert reloading.server.predict(image())[0] == 200
        wait_for(lambda: reloading.server.request("GET", "/ready")[0] == 200)
        wait_for(lambda: len(list(reloading.temporary.glob("fastgrad-serve-*/model.onnx"))) == 1)
        wait_for(lambda: len(reloading.server.processes) == 1)  # those of the version before have ended


def test_dead_pool_is_loaded_again(reloading: Reloading) -> None:
    """Its copy is damaged, so that no process can be started from it."""
    (copy,) = reloading.temporary.glob("fastgrad-serve-*/model.onnx")
    os.truncate(copy, 1000)
    (pid,) = reloading.server.processes
    said = "a process cannot be started"
    before = reloading.server.log.count(said)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: reloading.server.log.count(said) > before, 60)
    assert reloading.server.request("GET", "/ready")[0] == 503
    reloading.hup("was loaded")
    assert reloading.server.predict(image())[0] == 200


def test_digests(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model.pt2", Description((3, 8, 8), "float32", 4, 8, "cpu"))
    first = digest_of(path)
    with pytest.raises(PackageError, match=rf"model\.pt2 must have the SHA-256 0{{64}}; it was {first}"):
        create_app(path, sha256=["0" * 64])
    create_app(path, sha256=["0" * 64, first.upper()])


def test_digests_of_later_files(tiny_onnx: Path, other: Path, tmp_path: Path) -> None:
    file = shutil.copyfile(tiny_onnx, tmp_path / "model.onnx")
    with running(file, "--sha256", digest_of(file)) as server:
        reloading = Reloading(server, file, tmp_path)
        shutil.copyfile(other, file)
        reloading.hup("must have the SHA-256")
        assert set(reloading.names()) <= {"cat", "dog", "cow", "hen"}
