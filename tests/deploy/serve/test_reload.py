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

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from deploy_models import write_archive
from python_process import run_python
from serve_client import Server, wait_for
from serve_load import Load
from serve_stub import FakeChild

from fastgrad.deploy.file.onnx_file import sum_entry
from fastgrad.deploy.file.package import Description, PackageError
from fastgrad.deploy.file.reading import digest_of
from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.served import Model, Served


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


def test_request_keeps_its_version(tiny_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copyfile(tiny_package, path)

    async def run() -> None:
        model = await started(path)
        old = model.served
        copy = old.copy
        another(path)
        with old.in_use():
            await model.reload()
            assert model.served is not old
            # Its body has come only now; meanwhile the file was replaced.
            await asyncio.sleep(0.05)
            assert await answer(old) == 1.0
            assert copy.exists()
        assert await answer(model.served) == 2.0
        await model.close()
        assert not copy.exists()
        assert not any(version.pool.workers[0].alive for version in (old, model.served))
        assert (model.reloads, model.failures) == (1, 0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path, _: path.unlink(), "No such file or directory"),
        (lambda path, content: path.write_bytes(content[:1000]), "not a readable"),
        (lambda path, _: (path.unlink(), os.mkfifo(path)), "it is no regular file"),
        (lambda path, _: (path.unlink(), path.symlink_to("/dev/zero")), "it is no regular file"),
        (lambda path, _: os.truncate(path, 2**31), "it has 2147483648 bytes or more; at most 1073741824 are read"),
    ],
    ids=["missing", "cut off", "a pipe", "a device", "2 GiB of nothing"],
)  # fmt: skip
def test_failed_reload_changes_nothing(
    break_it: Callable[[Path, bytes], Any],
    reason: str,
    tiny_onnx: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("fcntl")
    path = Path(shutil.copy(tiny_onnx, tmp_path / "model.onnx"))

    async def run() -> None:
        model = await started(path)
        break_it(path, tiny_onnx.read_bytes())
        await asyncio.wait_for(model.reload(), 10)
        assert await answer(model.served) == 1.0
        path.unlink(missing_ok=True)
        shutil.copy(tiny_onnx, path)
        # The same again keeps the drift monitor.
        await model.reload()
        assert (model.reloads, model.failures) == (0, 1)
        assert await answer(model.served) == 1.0
        await model.close()

    asyncio.run(run())
    assert re.search(rf"model model stays as it was: {path} (cannot be loaded: |is ){reason}", caplog.text)
    assert "fastgrad-serve" not in caplog.text


def test_digests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = archive(tmp_path / "model.pt2", 4)
    first = digest_of(path)
    with pytest.raises(PackageError, match=rf"model\.pt2 must have the SHA-256 0{{64}}; it was {first}"):
        create_app(path, sha256=[("model", "0" * 64)])
    other = digest_of(archive(tmp_path / "other.pt2", 5))
    app = create_app(path, sha256=[("model", first.upper()), ("model", other)])
    (model,) = app.state.models.values()
    model.served = with_fakes(model.served, 1.0)

    async def run() -> None:
        archive(path, 6)
        await model.reload()
        assert (model.reloads, model.failures, model.served.description.classes) == (0, 1, 4)
        await model.close()

    asyncio.run(run())
    assert "must have the SHA-256" in caplog.text


def archive(path: Path, classes: int) -> Path:
    return write_archive(path, Description((3, 8, 8), "float32", classes, 8, "cpu"))


def test_failed_start_names_the_file(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    path = archive(tmp_path / "model.pt2", 4)
    with pytest.raises(RuntimeError, match=rf"ERROR: +the server cannot start: {path} cannot be loaded: ") as raised:
        Server(path)
    assert "Traceback" not in str(raised.value)
    assert "fastgrad-serve" not in str(raised.value)
    served = Served(path)
    served.pool.load_timeout = 0.0
    with pytest.raises(PackageError, match=rf"^{path} cannot be loaded: no answer within 0 s$"):
        asyncio.run(served.start())


def another(path: Path) -> bytes:
    """Make it a file of other bytes, which answers alike."""
    if path.suffix == ".onnx":
        path.write_bytes(path.read_bytes()[: -len(sum_entry("0" * 64))])
    else:
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(file.namelist()[0].split("/")[0] + "/extra/note", "of no meaning")
    return path.read_bytes()


def damaged(content: bytes) -> bytes:
    """One bit in the middle of the graph is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def test_swap_under_load(served: Any, tmp_path: Path) -> None:
    """SIGHUP with another file, with one that is none, cut off, damaged inside, gone, and with the first again."""
    server, whole = served.server, served.file.read_bytes()
    alike = another(Path(shutil.copy(served.file, tmp_path)))
    load = Load(server, served.file, f"/predict/{served.name}")
    threads = load.start(8, 100_000)
    counts = {count: served.metric(f"fastgrad_model_{count}") for count in ("reloads", "reload_failures")}
    try:
        wait_for(lambda: load.right > 50, 60)
        for content, count in (
            (alike, "reloads"),
            (b"no model at all", "reload_failures"),
            (whole[:-2000], "reload_failures"),
            (damaged(whole), "reload_failures"),
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


def test_copies_of_killed_servers(tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")

    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / "fastgrad-serve-link").symlink_to("elsewhere")
    script = "import os, sys; from fastgrad.deploy.serve.served import Served; s = Served(sys.argv[1]); print(s.copy)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{script}; sys.stdout.flush(); os.kill(os.getpid(), 9)", str(tiny_package)]
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert Path(killed.stdout.strip()).exists()
    files = len(os.listdir("/dev/fd"))
    first, second = Served(tiny_package), Served(tiny_package, max_batch=1000, batch_wait=0.5)
    assert (second.pool.max_batch, second.pool.batch_wait) == (64, 0.5)  # no more than the file says
    # Its own, and nothing that another process holds or that is no folder.
    assert not Path(killed.stdout.strip()).exists()
    assert folders() == sorted(["elsewhere", "fastgrad-serve-link", first.copy.parent.name, second.copy.parent.name])
    listing = f"{script}; print(*os.listdir({str(tmp_path)!r}))"
    left = run_python("-c", listing, tiny_package, env=environment).split()
    assert {first.copy.parent.name, second.copy.parent.name} < set(left)
    for served in (first, second):
        asyncio.run(served.retire())
    assert folders() == ["elsewhere", "fastgrad-serve-link"]
    assert len(os.listdir("/dev/fd")) == files
