"""Slow, on a local cluster: each image has one row, whatever is killed, and Ray Serve answers as the server does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from python_process import run_python
from serve_client import image, running

from fastgrad.deploy.score import score

pytestmark = pytest.mark.slow

START = """
import json, os, signal, sys, threading, time, urllib.error, urllib.request
import ray
ray.init(num_cpus=3, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
"""
SCORE = (
    START
    + """
from fastgrad.deploy.ray import ScoreImages
model, folder, out = sys.argv[1:]

def kill_one():
    # An actor, once it has answered some batches.
    while not (os.path.isdir(out) and os.listdir(out)):
        time.sleep(0.05)
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{entry}/cmdline", "rb").read()
        except OSError:
            continue
        if line.startswith(b"ray::") and b"ScoreImages" in line:
            os.kill(int(entry), signal.SIGKILL)
            print("killed", flush=True)
            return

threading.Thread(target=kill_one, daemon=True).start()
images = ray.data.read_binary_files(folder, include_paths=True, override_num_blocks=50)
rows = images.map_batches(
    ScoreImages, fn_constructor_args=(model,), batch_size=16, compute=ray.data.ActorPoolStrategy(size=2)
)
rows.write_parquet(out)
ray.shutdown()
"""
)


def test_every_image_once(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    folder, out = tmp_path / "images", tmp_path / "rows"
    folder.mkdir()
    for i in range(2000):
        (folder / f"{i:04d}.png").write_bytes(image(i, (60, 60)) if i % 50 else b"bad")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    assert "killed" in run_python("-W", "ignore", "-c", SCORE, tiny_onnx, folder, out, env=environment)
    rows = {Path(row["name"]).name: row for row in pq.read_table(out).to_pylist()}
    assert pq.read_table(out).num_rows == len(rows) == 2000
    score(tiny_onnx, folder, tmp_path / "plain", workers=0)
    for row in pq.read_table(tmp_path / "plain").to_pylist():
        found = rows[row["name"]]
        assert found["error"] == row["error"]
        assert found["class"] == row["class"]
        if row["error"] is None:
            assert found["uncertainty"] == pytest.approx(row["uncertainty"], rel=1e-5, abs=1e-5)


SERVE = (
    START
    + """
from ray import serve
from fastgrad.deploy.ray import deployment
model, folder, port = sys.argv[1:]
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(deployment(model, api_key="secret", max_body=10**6), route_prefix="/predict")

def post(body, kind, key="secret"):
    headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)

found = []
for name in sorted(os.listdir(folder)):
    body, kind = open(f"{folder}/{name}", "rb").read(), name.partition(".")[2].replace("-", "/")
    found.append(post(body, kind))
found += [post(b"x", "image/png", "wrong"), post(bytes(10**6 + 1), "image/png")]
print("answers", json.dumps(found))
serve.shutdown()
ray.shutdown()
"""
)


def test_ray_serve_answers_as_the_server(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    import socket

    numbers = json.dumps({"inputs": np.zeros((3, 8, 8)).tolist()}).encode()
    sent = [
        (image(3), "image-png"), (image(4, (30, 20), "JPEG"), "image-jpeg"), (numbers, "application-json"),
        (b"x", "image-png"), (b"{", "application-json"), (numbers.replace(b"0.0", b"NaN", 1), "application-json"),
        (image(), "text-plain"),
    ]  # fmt: skip
    (tmp_path / "bodies").mkdir()
    for number, (body, kind) in enumerate(sent):
        (tmp_path / "bodies" / f"{number}.{kind}").write_bytes(body)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = run_python("-W", "ignore", "-c", SERVE, tiny_onnx, tmp_path / "bodies", port, env=environment)
    (line,) = (line for line in printed.splitlines() if line.startswith("answers"))
    *found, wrong_key, too_large = json.loads(line.removeprefix("answers"))
    with running(tiny_onnx) as server:
        expected = [server.predict(body, kind.replace("-", "/")) for body, kind in sent]
    assert [status for status, _ in found] == [200, 200, 200, 400, 400, 422, 415]
    for (status, answer), (own, wanted) in zip(found, expected, strict=True):
        assert status == own
        assert answer == pytest.approx(wanted) if status != 200 else set(answer) == set(wanted)
        for name in ("uncertainty", "evidence", "probabilities") if status == 200 else ():
            assert answer[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5)
    assert (wrong_key[0], too_large[0]) == (401, 413)
