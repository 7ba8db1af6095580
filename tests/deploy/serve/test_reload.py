"""A file that changes takes over without a request lost; a broken one changes nothing, and the log says why."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from deploy.serve.client import Server, image, wait_for
from deploy.serve.test_faults import Load

from fastgrad.deploy.package import ModelPackage
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
    tiny_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.pt2"
    shutil.copyfile(tiny_package, path)
    versions = iter((1.0, 2.0))

    async def run() -> None:
        model = Model("model", str(path), lambda model: with_fakes(load(model), next(versions)))
        await model.served.pool.start()
        watching = asyncio.create_task(model.watch(0.01))
        path.write_bytes(tiny_package.read_bytes()[:1000])
        while not model.failures:
            await asyncio.sleep(0.01)
        path.unlink()
        await asyncio.sleep(0.05)
        assert (await model.served.pool.submit(np.zeros((3, 8, 8))))[1] == 1.0
        shutil.copyfile(tiny_package, path)
        while not model.reloads:
            await asyncio.sleep(0.01)
        assert (await model.served.pool.submit(np.zeros((3, 8, 8))))[1] == 2.0
        watching.cancel()
        await model.close()
        assert (model.reloads, model.failures) == (1, 1)

    with caplog.at_level(logging.INFO, "uvicorn.error"):
        asyncio.run(asyncio.wait_for(run(), 60))
    assert re.search(
        r"model: .*model\.pt2 has changed and cannot be loaded: .*not a readable .*goes on", caplog.text
    )


def test_both_kinds_of_file_and_a_swap_under_load(
    tiny_package: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """Two files served at once; under load one is replaced by itself, by a broken one and by one that is cut off."""
    first, second = tmp_path / "a.pt2", tmp_path / "b.onnx"
    shutil.copyfile(tiny_package, first)
    shutil.copyfile(tiny_onnx, second)
    server = Server(None, "--model", f"a={first}", "--model", f"b={second}", "--reload-seconds", "0.2")
    try:
        answers = [
            server.request("POST", f"/predict/{name}", image(3), {"Content-Type": "image/png"})
            for name in "ab"
        ]
        assert [status for status, _ in answers] == [200, 200]
        one, other = (json.loads(content)["uncertainty"] for _, content in answers)
        assert one == pytest.approx(other, abs=1e-5)
        load = Load(server, tiny_package)
        threads = load.start(8, 100_000)
        wait_for(lambda: load.right > 50, 60)
        for content, name in (
            (tiny_package.read_bytes(), "fastgrad_model_reloads"),
            (b"no model at all", "fastgrad_model_reload_failures"),
            (tiny_package.read_bytes()[:-2000], "fastgrad_model_reload_failures"),
            (tiny_package.read_bytes(), "fastgrad_model_reloads"),
        ):
            before, answered = server.metric(name), load.right
            beside = tmp_path / "new"
            beside.write_bytes(content)
            os.replace(beside, first)
            wait_for(lambda name=name, before=before: server.metric(name) > before, 120)
            wait_for(lambda answered=answered: load.right > answered + 20, 60)
        load.stop.set()
        for thread in threads:
            thread.join()
        assert (load.wrong, load.lost, load.refused, load.unavailable) == (0, 0, 0, 0)
        assert server.metric("fastgrad_model_reloads") == 2
        assert server.metric("fastgrad_model_reload_failures") == 2
    finally:
        log = server.stop_and_read()
    assert log.count("cannot be loaded") == 2
    assert "not a readable .pt2 archive" in log


def test_an_onnx_file_is_served(tiny_onnx: Path) -> None:
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = ModelPackage(tiny_onnx)(x[None])
    server = Server(tiny_onnx)
    try:
        status, answer = server.predict(json.dumps({"inputs": x.tolist()}), "application/json")
        assert status == 200
        assert answer["uncertainty"] == pytest.approx(float(expected.uncertainty), abs=1e-5)
        assert answer["label"] in ("cat", "dog", "cow", "hen")
    finally:
        assert server.stop() == 0
