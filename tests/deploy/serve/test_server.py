"""The running server: answers, refusals, and that it goes on answering."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import numpy as np
import pytest
import torch
from serve_client import form, image, png, wait_for, warned_of, workers_of

import fastgrad
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve.schema import Answer


@pytest.fixture(scope="session")
def openapi(shared: dict[str, Any]) -> Any:
    """The server's description of itself."""
    return json.loads(shared["onnx"].server.request("GET", "/openapi.json")[1])


def check(answer: dict, package: ModelPackage, x: torch.Tensor) -> None:
    direct, evidence = package.explain(x[None])
    Answer.model_validate(answer)
    assert answer["risk"] is answer["accepted"] is None
    assert answer["class"] == int(direct.probabilities[0].argmax())
    assert answer["label"] == package.description.labels[answer["class"]]
    # Batches of other sizes may sum in another order.
    np.testing.assert_allclose(answer["probabilities"], direct.probabilities[0].numpy(), rtol=1e-5)
    assert answer["uncertainty"] == pytest.approx(float(direct.uncertainty), rel=1e-5, abs=1e-5)
    assert answer["evidence"] == pytest.approx({name: float(own) for name, own in evidence.items()}, rel=1e-5)
    assert answer["reliable"] == (answer["uncertainty"] <= package.description.threshold)
    assert (answer["alarm"] is None) == answer["reliable"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(8, 8), (37, 20)])
def test_image(served: Any, package: ModelPackage, kind: str, size: tuple[int, int]) -> None:
    content = image(1, size, kind)
    for sent in ((content, f"image/{kind.lower()}"), form("file", content)):
        status, answer = served.predict(*sent)
        assert status == 200, answer
        check(answer, package, decode_image(content, package.description))


def test_json_inputs(served: Any, package: ModelPackage) -> None:
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    for inputs in (x, x[None]):
        body = json.dumps({"inputs": inputs.tolist()})
        status, answer = served.predict(body, "application/json; charset=utf-8")
        assert status == 200, answer
        check(answer, package, x)


def nested(value: str) -> str:
    return json.dumps({"inputs": np.zeros((3, 8, 8)).tolist()}).replace("0.0", value, 1)


#: Each the whole of a form; the first ends where the other begins.
TWO_FILES = form("file", image())[0].removesuffix(b"--\r\n") + form("file", image(1))[0].removeprefix(b"--frontier")

BAD = {
    "empty body": (b"", "image/png", 400, "empty"),
    "BMP": (image(0, (9, 9), "BMP"), "image/bmp", 400, "none of JPEG, PNG, WEBP"),
    "TIFF": (image(0, (9, 9), "TIFF"), "image/tiff", 400, "none of JPEG, PNG, WEBP"),
    "11 megapixels": (png(11_000, 1000, 8, 2, b""), "image/png", 413, "at most 10000000"),
    "not an image": (b"hello, this is text", "image/png", 400, "cannot be read"),
    "truncated image": (image(0, (64, 64))[:200], "image/png", 400, "cannot be read"),
    "40 MiB body": (bytes(40 * 2**20), "image/png", 413, "too large"),
    "decompression bomb": (png(30_000, 30_000, 8, 2, b""), "image/png", 413, "pixels"),
    "wrong content type": (image(), "text/html", 415, "text/html"),
    "no content type": (image(), "", 415, "missing"),
    "form without file": (*form("picture", image()), 422, "'file'"),
    "form with two files": (TWO_FILES, "multipart/form-data; boundary=frontier", 422, "one field 'file' .* were 2"),
    "form without boundary": (form("file", image())[0], "multipart/form-data", 400, "form"),
    "broken form": (b"--frontier\r\nno headers", "multipart/form-data; boundary=frontier", 400, "form|image"),
    "not JSON": (b"{", "application/json", 400, "not valid JSON"),
    "not UTF-8": (b'{"inputs": "\xff"}', "application/json", 400, "not valid JSON"),
    "JSON array": (b"[1]", "application/json", 422, "object"),
    "missing key": (b'{"input": [1]}', "application/json", 422, '"inputs"'),
    "wrong size": (b'{"inputs": [[1, 2], [3, 4]]}', "application/json", 422, r"shape \[3, 8, 8\]"),
    "ragged": (b'{"inputs": [[1, 2], [3]]}', "application/json", 422, "ragged"),
    "text inside": (nested('"a"'), "application/json", 422, "something else"),
    "null inside": (nested("null"), "application/json", 422, "something else"),
    "truth inside": (nested("true"), "application/json", 422, "something else"),
    "UTF-16": (nested("true").encode("utf-16"), "application/json", 400, "not valid JSON: 'utf-8'"),
    "NaN": (nested("NaN"), "application/json", 422, "finite"),
    "infinity": (nested("-Infinity"), "application/json", 422, "finite"),
    "beyond float64": (nested("1e999"), "application/json", 422, "finite"),
    "beyond float32": (nested("1e39"), "application/json", 422, "finite"),
    "result overflows": (nested("1e38"), "application/json", 422, "finite"),
    "huge integer": (nested("1" * 400), "application/json", 422, "finite|something else|numbers"),
    "too many digits": (nested("1" * 5000), "application/json", 400, "JSON"),
    "nested too deeply": (b'{"inputs": ' + b"[" * 450, "application/json", 400, "JSON"),
    "brackets without end": (b"[" * 100_000, "application/json", 422, "there were more"),
    "more numbers": (b'{"inputs": [' + b"1," * 1000 + b"1]}", "application/json", 422, "there were more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(served: Any, openapi: Any, name: str) -> None:
    body, content_type, status, message = BAD[name]
    got, answer = served.predict(body, content_type)
    assert got == status, answer
    assert str(status) in openapi["paths"]["/predict/{name}"]["post"]["responses"]
    assert re.search(message, answer["detail"]), answer
    assert "Traceback" not in answer["detail"]
    assert len(answer["detail"]) < 400
    assert served.predict(image(), "image/png")[0] == 200


def test_no_request_fills_the_log(served: Any) -> None:
    part = b'--f\r\nContent-Disposition: form-data; name="a"\r\nContent-Transfer-Encoding: zip\r\n\r\nx\r\n'
    before = served.server.log
    assert served.predict(part * 100 + b"--f--\r\n", "multipart/form-data; boundary=f")[0] == 422
    assert served.server.request("GET", "/health", headers={"Connection": "Upgrade", "Upgrade": "websocket"})[0] == 200
    assert served.predict(warned_of(), "image/png")[0] == 200
    assert served.server.log == before


def test_what_it_says_of_itself(served: Any, package: ModelPackage, openapi: Any) -> None:
    for path in ("/health", "/ready"):
        assert served.server.request("GET", path)[0] == 200
    model = json.loads(served.server.request("GET", f"/model/{served.name}")[1])
    assert model["labels"] == ["cat", "dog", "cow", "hen"]
    assert model["evidence"] == package.description.evidence
    assert len(model["histogram"]["counts"]) + 1 == len(model["histogram"]["edges"])
    assert openapi["info"]["version"] == fastgrad.__version__
    operation = openapi["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"image/*", "multipart/form-data", "application/json"}
    assert {"200", "401", "413", "415", "422", "503", "504"} <= set(operation["responses"])
    assert {"/health", "/ready", "/metrics", "/predict"} <= set(openapi["paths"])
    status, page = served.server.request("GET", "/")
    assert status == 200
    # The page loads nothing from elsewhere.
    assert set(re.findall(r"https?://[^\s\"']*", page.decode())) <= {"http://www.w3.org/2000/svg"}


def test_metrics_count_what_happened(served: Any) -> None:
    # Images of other tests, which are noise, may have raised the alarm of the server that they share.
    reset = f"/drift/{served.name}?action=reset&reason=test"
    assert served.server.request("POST", reset)[0] == 200
    before = served.metric('fastgrad_requests_total{status="200"}')
    flagged = served.metric("fastgrad_drift_scores")
    for seed in range(5):
        assert served.predict(image(seed), "image/png")[0] == 200
    assert served.metric('fastgrad_requests_total{status="200"}') == before + 5
    assert served.metric("fastgrad_drift_scores") == flagged + 5
    for name in ("request_seconds_count", "uncertainty_count"):
        assert served.metric(f"fastgrad_{name}") >= before + 5
    assert 1 <= served.metric("fastgrad_batch_size_count") <= served.metric("fastgrad_request_seconds_count")
    assert 0 < served.metric("fastgrad_expected_share_flagged") < 1
    assert 0 <= served.metric("fastgrad_share_flagged") <= 1
    assert served.metric("fastgrad_drift_evidence") > 0
    for name in ("drift_alarm", "queue_length", "worker_restarts"):
        assert served.metric(f"fastgrad_{name}") == 0


def test_killed_worker(served: Any) -> None:
    """Another one answers, and there are no more files than before, nor any under a name that others can foresee."""

    def names() -> list[str]:
        return sorted(path.name for path in (*served.temporary.iterdir(), *served.temporary.rglob("*.so")))

    before = names()
    assert all(name.startswith("fastgrad-serve-") for name in before if not name.endswith(".so"))
    (pid,) = workers_of(served.server.process.pid, served.file.name.encode())
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: workers_of(served.server.process.pid, served.file.name.encode()) not in ([], [pid]))
    assert served.predict(image(), "image/png")[0] == 200
    assert names() == before
