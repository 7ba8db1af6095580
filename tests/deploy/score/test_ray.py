"""Slow: Ray scores each image once, whatever is killed, and Ray Serve answers as the server does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from python_process import run_python
from serve_client import image

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage

pytestmark = pytest.mark.slow

RAY = """
import json, os, signal, sys, threading, time, warnings
import ray
from fastgrad.deploy.score.ray import score_dataset
package, folder, out, kill = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)

def killer():
    # Once the first parts are written, and again later.
    killed = 0
    while killed < 2:
        parts = len([name for name in os.listdir(out) if name.startswith("part")]) if os.path.isdir(out) else 0
        if parts >= 3 * (killed + 1):
            for entry in os.listdir("/proc"):
                try:
                    line = open(f"/proc/{entry}/cmdline", "rb").read()
                except (OSError, NotADirectoryError):
                    continue
                if line.startswith(b"ray::") and b"PartScorer" in line:
                    os.kill(int(entry), signal.SIGKILL)
                    killed += 1
                    print("killed", killed, flush=True)
                    break
        time.sleep(0.01)

if kill == "yes":
    threading.Thread(target=killer, daemon=True).start()
counts = score_dataset(package, folder, out, part=5, batch=5)
print(json.dumps(counts))
ray.shutdown()
"""


@pytest.mark.parametrize("kill", ["no", "yes"])
def test_every_image_once(tiny_package: Path, tmp_path: Path, kill: str) -> None:
    pytest.importorskip("ray")
    folder, out = tmp_path / "images", tmp_path / "scores"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i:03d}.png").write_bytes(image(i, (300, 300)) if i % 50 else b"bad")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    printed = run_python("-W", "ignore", "-c", RAY, tiny_package, folder, out, kill, env=environment)
    if kill == "yes":
        assert "killed 2" in printed
    assert '"images": 400, "unreadable": 8' in printed
    # Readers of Parquet take the folder as one table; Ray's order of work does not show in it.
    rows = pq.read_table(sorted(out.glob("part-*.parquet"))).to_pylist()
    assert [row["name"] for row in rows] == [f"{i:03d}.png" for i in range(400)]
    model = ModelPackage(tiny_package)
    for row in rows[1::37]:
        direct = model(decode_image((folder / row["name"]).read_bytes(), model.description)[None])
        assert row["uncertainty"] == pytest.approx(float(direct.uncertainty), rel=1e-5, abs=1e-5)


RAY_SERVE = """
import sys, time, json, urllib.request, urllib.error
import ray
from ray import serve
from fastgrad.deploy.serve.ray import serve_model
package, image = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve_model(package, port=8791)
def post(body, kind):
    try:
        request = urllib.request.Request("http://127.0.0.1:8791/predict", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
content = open(image, "rb").read()
print("answers", json.dumps([post(content, "image/png"), post(b"x", "image/png"), post(content, "text/plain")]))
serve.shutdown()
ray.shutdown()
"""


def test_ray_serve(tiny_package: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    content = image(3)
    (tmp_path / "a.png").write_bytes(content)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = run_python("-W", "ignore", "-c", RAY_SERVE, tiny_package, tmp_path / "a.png", env=environment)
    (line,) = (line for line in printed.splitlines() if line.startswith("answers"))
    good, unreadable, other = json.loads(line.removeprefix("answers"))
    model = ModelPackage(tiny_package)
    direct = model(decode_image(content, model.description)[None])
    assert good[0] == 200
    np.testing.assert_allclose(good[1]["probabilities"], direct.probabilities[0].numpy(), rtol=1e-5)
    assert (unreadable[0], other[0]) == (400, 415)
    assert "cannot be read" in unreadable[1]["detail"]
