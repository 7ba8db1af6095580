"""Another file takes over without a request lost; a broken one changes nothing, and the log says why."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_models import write_archive
from serve_client import Server, wait_for
from serve_load import Load
from serve_stub import FakeChild

from fastgrad.deploy.file.package import Description, PackageError
from fastgrad.deploy.file.reading import digest_of
from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.served import Model, Served

pytestmark = pytest.mark.anyio


def with_fakes(served: Served, constant: float) -> Served:
    served.pool.workers = [FakeChild(constant)]  # type: ignore[list-item]
    return served


async def started(path: Path) -> Model:
    """A model whose versions answer 1, then 2."""
    model, plain = Model("model", path), Model._version
    model.served = with_fakes(model.served, 1.0)
    model._version = lambda: with_fakes(plain(model), 2.0)  # type: ignore[method-assign]
    await model.served.pool.start()
    return model


async def answer(served: Served) -> float:
    return float(np.frombuffer(await served.pool.submit(bytes(193)))[4])


async def test_request_keeps_its_version(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt2", 4)
    model = await started(path)
    old = model.served
    archive(path, 5)
    with old.in_use():
        await model.reload()
        assert model.served is not old
        # Its body has come only now; meanwhile the file was replaced.
        await asyncio.sleep(0.05)
        assert await answer(old) == 1.0
        assert old.copy.exists()
    assert await answer(model.served) == 2.0
    await model.close()
    assert not old.copy.exists()
    assert not any(version.pool.workers[0].alive for version in (old, model.served))
    assert (model.reloads, model.failures) == (1, 0)


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "No such file or directory"),
    "cut off": (lambda path: os.truncate(path, 1000), "not a readable"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is no regular file"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "it is no regular file"),
    "2 GiB of nothing": (
        lambda path: os.truncate(path, 2**31),
        "it has 2147483648 bytes or more; at most 1073741824 are read",
    ),
}


@pytest.mark.parametrize("how", BREAK)
async def test_failed_reload_changes_nothing(
    how: str, tiny_onnx: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("fcntl")
    path, (break_it, reason) = shutil.copyfile(tiny_onnx, tmp_path / "model.onnx"), BREAK[how]
    model = await started(path)
    break_it(path)
    await asyncio.wait_for(model.reload(), 10)
    assert await answer(model.served) == 1.0
    path.unlink(missing_ok=True)
    shutil.copyfile(tiny_onnx, path)
    # The same again keeps the drift monitor.
    await model.reload()
    assert (model.reloads, model.failures) == (0, 1)
    assert await answer(model.served) == 1.0
    await model.close()
    assert re.search(rf"model model stays as it was: {path} (cannot be loaded: |is ){reason}", caplog.text)
    assert "fastgrad-serve" not in caplog.text


async def test_digests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = archive(tmp_path / "model.pt2", 4)
    first = digest_of(path)
    with pytest.raises(PackageError, match=rf"model\.pt2 must have the SHA-256 0{{64}}; it was {first}"):
        create_app(path, sha256=[("model", "0" * 64)])
    other = digest_of(archive(tmp_path / "other.pt2", 5))
    app = create_app(path, sha256=[("model", first.upper()), ("model", other)])
    (model,) = app.state.models.values()
    archive(path, 6)
    await model.reload()
    assert (model.reloads, model.failures, model.served.description.classes) == (0, 1, 4)
    await model.close()
    assert "must have the SHA-256" in caplog.text


def archive(path: Path, classes: int) -> Path:
    return write_archive(path, Description((3, 8, 8), "float32", classes, 8, "cpu"))


async def test_failed_start_names_the_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt2", 4)
    with pytest.raises(RuntimeError, match=rf"ERROR: +the server cannot start: {path} cannot be loaded: ") as raised:
        Server(path)
    assert "Traceback" not in str(raised.value)
    assert "fastgrad-serve" not in str(raised.value)
    served = Served(path)
    served.pool.load_timeout = 0.0
    with pytest.raises(PackageError, match=rf"^{path} cannot be loaded: no answer within 0 s$"):
        await served.start()


def test_swap_under_load(shared: dict[str, Any], tmp_path: Path) -> None:
    """SIGHUP with another file, with one that is none, cut off, damaged inside, gone, and with the first again."""
    served = shared["pt2"]
    server, whole = served.server, served.file.read_bytes()
    alike = shutil.copyfile(served.file, tmp_path / "alike.pt2")
    with zipfile.ZipFile(alike, "a") as file:
        file.writestr(file.namelist()[0].split("/")[0] + "/extra/note", "of no meaning")
    # One bit in the middle of the code.
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 16
    load = Load(server, served.file, f"/predict/{served.name}", pause=0.01)
    threads = load.start(8, 100_000)
    counts = {count: served.metric(f"fastgrad_model_{count}") for count in ("reloads", "reload_failures")}
    try:
        wait_for(lambda: load.right > 50, 60)
        for content, count in (
            (alike.read_bytes(), "reloads"),
            (b"no model at all", "reload_failures"),
            (whole[:-2000], "reload_failures"),
            (damaged, "reload_failures"),
            (None, "reload_failures"),
            (whole, "reloads"),
        ):
            metric = f"fastgrad_model_{count}"
            before, answered = served.metric(metric), load.right
            served.file.unlink(missing_ok=True)
            if content is not None:
                served.file.write_bytes(content)
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda metric=metric, before=before: served.metric(metric) > before, 120)
            wait_for(lambda answered=answered: load.right > answered + 20, 60)
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    print(f"{served.name}: {load.counts()}")
    assert (load.wrong, load.lost, load.cut, load.refused, load.unavailable) == (0, 0, 0, 0, 0)
    for count, expected in (("reloads", 2), ("reload_failures", 4)):
        assert served.metric(f"fastgrad_model_{count}") - counts[count] == expected
    reasons = re.findall(rf"model {served.name} stays as it was: {served.file} (.*)", server.log)
    for reason, said in zip(
        ("is not a readable", "is not a readable", "is damaged", "No such file"), reasons, strict=True
    ):
        assert reason in said


async def test_copies_of_killed_servers(tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")

    def folders() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / "fastgrad-serve-link").symlink_to("elsewhere")
    others, files = folders(), len(os.listdir("/dev/fd"))
    first = Served(tiny_package)
    code = """
import os, sys
from fastgrad.deploy.serve.served import Served
served = Served(sys.argv[1])
os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tiny_package)], env=environment, check=False)
    # It left its own, and those of others alone.
    assert len(folders() - others - {first.copy.parent.name}) == 1
    assert first.copy.exists()
    second = Served(tiny_package, max_batch=1000, batch_wait=0.5)
    assert (second.pool.max_batch, second.pool.batch_wait) == (64, 0.5)  # no more than the file says
    assert folders() == others | {first.copy.parent.name, second.copy.parent.name}
    for served in (first, second):
        await served.retire()
    assert folders() == others
    assert len(os.listdir("/dev/fd")) == files
