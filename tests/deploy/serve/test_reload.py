"""A file that changes takes over without a request lost; a broken one changes nothing, and the log says why."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
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
from serve_stub import FakeChild, stub

from fastgrad.deploy.file.onnx_file import sum_entry
from fastgrad.deploy.file.package import Description, PackageError, digest_of
from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.served import Model, Served


def with_fakes(served: Served, constant: float) -> Served:
    served.pool.workers = [FakeChild(constant)]  # type: ignore[list-item]
    return served


async def started(path: Path) -> Model:
    """A model whose versions answer 1, then 2."""
    versions = iter((1.0, 2.0))
    model = Model("model", str(path), lambda path: with_fakes(Served(path), next(versions)))
    await model.served.pool.start()
    return model


async def answer(served: Served) -> float:
    return float(np.frombuffer(await served.pool.submit([bytes(193)]))[4])


def test_a_request_keeps_its_version_and_the_old_one_ends_after_it(tiny_package: Path, tmp_path: Path) -> None:
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


def test_a_change_is_seen_and_a_broken_file_is_not_used(
    model_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"model{model_file.suffix}"
    shutil.copyfile(model_file, path)

    async def run() -> None:
        model = await started(path)
        watching = asyncio.create_task(model.watch(0.01))
        path.write_bytes(model_file.read_bytes()[:1000])
        while not model.failures:
            await asyncio.sleep(0.01)
        # It is tried once.
        await asyncio.sleep(0.3)
        path.unlink()
        await asyncio.sleep(0.05)
        assert await answer(model.served) == 1.0
        # The same again keeps the drift monitor.
        shutil.copyfile(model_file, path)
        await asyncio.sleep(0.3)
        assert (model.reloads, model.failures) == (0, 1)
        another(path)
        while not model.reloads:
            await asyncio.sleep(0.01)
        assert await answer(model.served) == 2.0
        watching.cancel()
        await model.close()
        assert (model.reloads, model.failures) == (1, 1)

    with caplog.at_level(logging.INFO, "uvicorn.error"):
        asyncio.run(asyncio.wait_for(run(), 60))
    assert re.search(
        rf"model: .*model\{path.suffix} has changed and cannot be loaded: .*not a readable .*goes on", caplog.text
    )
    assert "fastgrad-served" not in caplog.text


def test_only_pinned_files_are_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, pins = archive(tmp_path / "model.pt2", 4), tmp_path / "pins"
    # The second has been taken back.
    for content in ("# none yet\n", f" # {digest_of(path)}  {path.name}\n"):
        pins.write_text(content)
        with pytest.raises(PackageError, match=r"is not a file that .*pins names: its SHA-256 is"):
            create_app(str(path), pins=pins)
    # As Windows writes it: capitals, and marked as UTF-8.
    pins.write_text(f"{digest_of(path).upper()}  {path.name}\n", "utf-8-sig")
    app = create_app(str(path), pins=pins)
    (model,) = app.state.models.values()
    model.served = with_fakes(model.served, 1.0)

    async def run() -> None:
        archive(path, 5)
        await model.reload()
        assert (model.reloads, model.failures) == (0, 1)
        assert model.served.description.classes == 4
        await model.close()

    asyncio.run(run())
    assert "is not a file that" in caplog.text


def test_nothing_is_loaded_anew_without_pins(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pt2", 4)
    app = stub(create_app(str(path), reload_every=0.01), {"model": [0.25] * 4 + [1.0]})
    (model,) = app.state.models.values()
    model.served = with_fakes(model.served, 1.0)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            archive(path, 5)
            await asyncio.sleep(0.3)
            assert (model.reloads, model.failures) == (0, 0)
            assert model.served.description.classes == 4

    asyncio.run(run())


def archive(path: Path, classes: int) -> Path:
    return write_archive(path, Description((3, 8, 8), "float32", classes, 8, "cpu"))


def test_a_file_that_cannot_be_run_is_named_and_its_copy_is_not(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    path = archive(tmp_path / "model.pt2", 4)
    with pytest.raises(RuntimeError, match=rf"ERROR: +the server cannot start: {path} cannot be loaded: ") as raised:
        Server(path)
    assert "Traceback" not in str(raised.value)
    assert "fastgrad-served" not in str(raised.value)
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


def test_a_swap_under_load(served: Any, tmp_path: Path) -> None:
    """A file is replaced by its like, by one not pinned, one that is none, cut off, damaged inside, and by itself."""
    server, whole = served.server, served.file.read_bytes()
    alike = another(Path(shutil.copy(served.file, tmp_path)))
    load = Load(server, served.file, f"/predict/{served.name}")
    # What names it differs, so that it is another file.
    threads = load.start(8, 100_000)
    counts = {count: served.metric(f"fastgrad_model_{count}") for count in ("reloads", "reload_failures")}
    try:
        wait_for(lambda: load.right > 50, 60)
        for content, pinned, count in (
            (alike, True, "reloads"),
            (whole + b"other", False, "reload_failures"),
            (b"no model at all", True, "reload_failures"),
            (whole[:-2000], True, "reload_failures"),
            (damaged(whole), True, "reload_failures"),
            (whole, True, "reloads"),
        ):
            metric = f"fastgrad_model_{count}"
            before, answered = served.metric(metric), load.right
            if pinned:
                served.pin(content)
            (served.file.parent / "new").write_bytes(content)
            os.replace(served.file.parent / "new", served.file)
            wait_for(lambda metric=metric, before=before: served.metric(metric) > before, 120)
            wait_for(lambda answered=answered: load.right > answered + 20, 60)
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    print(f"{served.name}: {load.counts()}")
    assert (load.wrong, load.lost, load.refused, load.unavailable) == (0, 0, 0, 0)
    for count, expected in (("reloads", 2), ("reload_failures", 4)):
        assert served.metric(f"fastgrad_model_{count}") - counts[count] == expected
    reasons = re.findall(rf"model {served.name}: .* cannot be loaded: (.*); the one before goes on", server.log)
    assert "is not a file that" in reasons[0]
    assert all("not a readable" in reason for reason in reasons[1:3])
    assert "is damaged" in reasons[3]


def test_copies_of_servers_that_were_killed_are_removed(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")

    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "fastgrad-served-link").symlink_to("elsewhere")
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
    assert folders() == sorted(["elsewhere", "fastgrad-served-link", first.copy.parent.name, second.copy.parent.name])
    listing = f"{script}; print(*os.listdir({str(tmp_path)!r}))"
    left = run_python("-c", listing, tiny_package, env=environment).split()
    assert {first.copy.parent.name, second.copy.parent.name} < set(left)
    for served in (first, second):
        asyncio.run(served.retire())
    assert folders() == ["elsewhere", "fastgrad-served-link"]
    assert len(os.listdir("/dev/fd")) == files
