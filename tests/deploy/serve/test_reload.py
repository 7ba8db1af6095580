"""A file that changes takes over without a request lost; a broken one changes nothing, and the log says why."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from serve_client import Server, image, wait_for
from serve_load import Load

from fastgrad.deploy.serve.served import Model, Served


def load(model: Model) -> Served:
    return Served(
        model.path,
        false_alarm_rate=None,
        max_batch=32,
        pool={"threads": 1},
        metrics={
            "drift_false_alarm_rate": 0.01,
            "reloads": lambda: model.reloads,
            "reload_failures": lambda: model.failures,
        },
    )


class FakeWorker:
    """Answers with a constant, once it is let."""

    def __init__(self, constant: float) -> None:
        self.constant, self.ready, self.process = constant, False, None

    def start(self) -> None:
        self.ready = True

    def stop(self, patience: float = 0.0) -> None:
        self.ready = False

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(batch), 4), 0.25), np.full(len(batch), self.constant)


def with_fakes(served: Served, constant: float) -> Served:
    for worker in served.pool._workers:
        fake: Any = FakeWorker(constant)
        worker.start, worker.stop, worker.run = fake.start, fake.stop, fake.run  # type: ignore[method-assign]
    return served


def test_a_request_keeps_its_version_and_the_old_one_ends_after_it(
    tiny_package: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    shutil.copyfile(tiny_package, path)
    versions = iter((1.0, 2.0))

    async def run() -> None:
        model = Model("model", str(path), lambda model: with_fakes(load(model), next(versions)))
        await model.served.pool.start()
        old = model.served
        copy = Path(old.pool._workers[0].path)
        with old.in_use():
            await model.reload()
            assert model.served is not old
            # Its body has come only now; meanwhile the file was replaced.
            await asyncio.sleep(0.05)
            assert (await old.pool.submit(np.zeros((3, 8, 8))))[1] == 1.0
            assert copy.exists()
        assert (await model.served.pool.submit(np.zeros((3, 8, 8))))[1] == 2.0
        await model.close()
        assert not copy.exists()
        assert (model.reloads, model.failures) == (1, 0)

    asyncio.run(run())


def test_a_change_is_seen_and_a_broken_file_is_not_used(
    model_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"model{model_file.suffix}"
    shutil.copyfile(model_file, path)
    versions = iter((1.0, 2.0))

    async def run() -> None:
        model = Model("model", str(path), lambda model: with_fakes(load(model), next(versions)))
        await model.served.pool.start()
        watching = asyncio.create_task(model.watch(0.01))
        path.write_bytes(model_file.read_bytes()[:1000])
        while not model.failures:
            await asyncio.sleep(0.01)
        path.unlink()
        await asyncio.sleep(0.05)
        assert (await model.served.pool.submit(np.zeros((3, 8, 8))))[1] == 1.0
        shutil.copyfile(model_file, path)
        while not model.reloads:
            await asyncio.sleep(0.01)
        assert (await model.served.pool.submit(np.zeros((3, 8, 8))))[1] == 2.0
        watching.cancel()
        await model.close()
        assert (model.reloads, model.failures) == (1, 1)

    with caplog.at_level(logging.INFO, "uvicorn.error"):
        asyncio.run(asyncio.wait_for(run(), 60))
    assert re.search(
        rf"model: .*model\{path.suffix} has changed and cannot be loaded: .*not a readable .*goes on",
        caplog.text,
    )


@pytest.fixture(scope="module")
def both(
    tiny_package: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A server of both kinds, each under its suffix, and the folder that it reads them from."""
    folder = tmp_path_factory.mktemp("served")
    named = []
    for file in (tiny_package, tiny_onnx):
        named += ["--model", f"{file.suffix[1:]}={shutil.copyfile(file, folder / f'model{file.suffix}')}"]
    server = Server(None, *named, "--reload-seconds", "0.2")
    yield server, folder
    assert server.stop() == 0


def damaged(content: bytes) -> bytes:
    """One bit in the middle of the graph is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def test_both_kinds_at_once_give_one_answer(both: tuple[Server, Path]) -> None:
    server, _ = both
    answers = [
        server.request("POST", f"/predict/{name}", image(3), {"Content-Type": "image/png"})
        for name in ("pt2", "onnx")
    ]
    assert [status for status, _ in answers] == [200, 200]
    one, other = (json.loads(content) for _, content in answers)
    assert one["uncertainty"] == pytest.approx(other["uncertainty"], abs=1e-5)
    assert one["label"] in ("cat", "dog", "cow", "hen")


def test_a_swap_under_load(both: tuple[Server, Path], model_file: Path) -> None:
    """A file is replaced by itself, by one that is none, one cut off, one damaged inside, and again by itself."""
    server, folder = both
    name, whole = model_file.suffix[1:], model_file.read_bytes()
    load = Load(server, model_file, f"/predict/{name}")
    threads = load.start(8, 100_000)
    try:
        wait_for(lambda: load.right > 50, 60)
        for content, count in (
            (whole, "reloads"),
            (b"no model at all", "reload_failures"),
            (whole[:-2000], "reload_failures"),
            (damaged(whole), "reload_failures"),
            (whole, "reloads"),
        ):
            metric = f"fastgrad_model_{count}", f"/metrics/{name}"
            before, answered = server.metric(*metric), load.right
            (folder / "new").write_bytes(content)
            os.replace(folder / "new", folder / f"model{model_file.suffix}")
            wait_for(lambda metric=metric, before=before: server.metric(*metric) > before, 120)
            wait_for(lambda answered=answered: load.right > answered + 20, 60)
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    print(f"{model_file.suffix}: {load.counts()}")
    assert (load.wrong, load.lost, load.refused, load.unavailable) == (0, 0, 0, 0)
    for count, expected in (("reloads", 2), ("reload_failures", 3)):
        assert server.metric(f"fastgrad_model_{count}", f"/metrics/{name}") == expected
    reasons = re.findall(rf"model {name}: .* cannot be loaded: (.*); the one before goes on", server.log)
    assert len(reasons) == 3
    assert all(f"not a readable {model_file.suffix}" in reason for reason in reasons[:2])
    assert "is damaged" in reasons[2]
