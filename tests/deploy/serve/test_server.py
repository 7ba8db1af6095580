"""The running server: answers, refusals, and that it goes on answering."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serve_client import Server, image, png, running, wait_for, warned_of

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage


def check(answer: dict[str, Any], package: ModelPackage, x: torch.Tensor) -> None:
    direct, evidence = package.explain(x[None])
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
def test_image(server: Server, package: ModelPackage, kind: str, size: tuple[int, int]) -> None:
    content = image(1, size, kind)
    status, answer = server.predict(content, f"image/{kind.lower()}")
    assert status == 200, answer
    check(answer, package, decode_image(content, package.description))


def test_json_inputs(server: Server, package: ModelPackage) -> None:
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    for inputs in (x, x[None]):
        status, answer = server.predict(json.dumps({"inputs": inputs.tolist()}), "application/json; charset=utf-8")
        assert status == 200, answer
        check(answer, package, x)


def nested(value: str) -> str:
    return json.dumps({"inputs": np.zeros((3, 8, 8)).tolist()}).replace("0.0", value, 1)


JSON = "application/json"
BAD = {
    "empty body": (b"", "image/png", 400, "empty"),
    "BMP": (image(0, (9, 9), "BMP"), "image/bmp", 400, "none of JPEG, PNG, WEBP"),
    "TIFF": (image(0, (9, 9), "TIFF"), "image/tiff", 400, "none of JPEG, PNG, WEBP"),
    "11 megapixels": (png(11_000, 1000, 8, 2, b""), "image/png", 413, "at most 10000000"),
    "not an image": (b"hello, this is text", "image/png", 400, "cannot be read"),
    "truncated image": (image(0, (64, 64))[:200], "image/png", 400, "cannot be read"),
    "decompression bomb": (png(30_000, 30_000, 8, 2, b""), "image/png", 413, "pixels"),
    "wrong content type": (image(), "text/html", 415, "text/html"),
    "form": (image(), "multipart/form-data; boundary=f", 415, "send an image"),
    "no content type": (image(), "", 415, "missing"),
    "not JSON": (b"{", JSON, 400, "not valid JSON"),
    "not UTF-8": (b'{"inputs": "\xff"}', JSON, 400, "not valid JSON"),
    "JSON array": (b"[1]", JSON, 422, "object"),
    "missing key": (b'{"input": [1]}', JSON, 422, '"inputs"'),
    "wrong size": (b'{"inputs": [[1, 2], [3, 4]]}', JSON, 422, r"shape \[3, 8, 8\]"),
    "ragged": (b'{"inputs": [[1, 2], [3]]}', JSON, 422, "ragged"),
    "text inside": (nested('"a"'), JSON, 422, "something else"),
    "null inside": (nested("null"), JSON, 422, "something else"),
    "truth inside": (nested("true"), JSON, 422, "something else"),
    "UTF-16": (nested("true").encode("utf-16"), JSON, 400, "not valid JSON: 'utf-8'"),
    "NaN": (nested("NaN"), JSON, 422, "finite"),
    "infinity": (nested("-Infinity"), JSON, 422, "finite"),
    "beyond float64": (nested("1e999"), JSON, 422, "finite"),
    "beyond float32": (nested("1e39"), JSON, 422, "finite"),
    "result overflows": (nested("1e38"), JSON, 422, "finite"),
    "huge integer": (nested("1" * 400), JSON, 422, "finite|something else|numbers"),
    "too many digits": (nested("1" * 5000), JSON, 400, "JSON"),
    "nested too deeply": (b'{"inputs": ' + b"[" * 450, JSON, 400, "JSON"),
    "brackets without end": (b"[" * 100_000, JSON, 422, "there were more"),
    "more numbers": (b'{"inputs": [' + b"1," * 1000 + b"1]}", JSON, 422, "there were more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server: Server, name: str) -> None:
    body, content_type, status, message = BAD[name]
    got, answer = server.predict(body, content_type)
    assert got == status, answer
    assert re.search(message, answer["detail"]), answer
    assert len(answer["detail"]) < 400
    assert server.predict(image())[0] == 200


def test_what_it_says_of_itself(server: Server, package: ModelPackage) -> None:
    for path in ("/health", "/ready"):
        assert server.request("GET", path)[0] == 200
    model = json.loads(server.request("GET", "/model")[1])
    assert model["labels"] == ["cat", "dog", "cow", "hen"]
    assert model["evidence"] == package.description.evidence
    assert len(model["histogram"]["counts"]) + 1 == len(model["histogram"]["edges"])
    paths = json.loads(server.request("GET", "/openapi.json")[1])["paths"]
    assert {"/health", "/ready", "/metrics", "/model", "/drift", "/predict"} == set(paths)
    status, page = server.request("GET", "/")
    assert status == 200
    # The page loads nothing from elsewhere.
    assert set(re.findall(r"https?://[^\s\"']*", page.decode())) <= {"http://www.w3.org/2000/svg"}


def test_metrics_count_what_happened(server: Server) -> None:
    # Images of other tests, which are noise, may have raised the alarm of the server that they share.
    assert server.request("POST", "/drift?action=reset&reason=test")[0] == 200
    before = server.metric('fastgrad_requests_total{status="200"}')
    for seed in range(5):
        assert server.predict(image(seed))[0] == 200
    assert server.metric('fastgrad_requests_total{status="200"}') == before + 5
    assert server.metric("fastgrad_drift_scores") == 5
    for name in ("request_seconds_count", "uncertainty_count"):
        assert server.metric(f"fastgrad_{name}") >= before + 5
    assert 1 <= server.metric("fastgrad_batch_size_count") <= server.metric("fastgrad_request_seconds_count")
    assert 0 < server.metric("fastgrad_expected_share_flagged") < 1
    assert 0 <= server.metric("fastgrad_share_flagged") <= 1
    assert server.metric("fastgrad_drift_evidence") > 0
    for name in ("drift_alarm", "queue_length"):
        assert server.metric(f"fastgrad_{name}") == 0


def test_no_request_fills_the_log(server: Server) -> None:
    before = server.log
    assert server.predict(warned_of())[0] == 200
    assert server.predict(b"\x1b[31m", "text/html")[0] == 415
    assert server.log == before


def test_killed_process(server: Server) -> None:
    """It is replaced also while nothing is asked; a request meanwhile waits for the new one."""
    (pid,) = server.processes
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.request("GET", "/ready")[0] == 503)
    assert server.predict(image())[0] == 200
    wait_for(lambda: server.request("GET", "/ready")[0] == 200)
    (new,) = server.processes
    assert new != pid


def test_signal_to_all_processes(server: Server) -> None:
    """A service manager may send SIGTERM or SIGHUP to all of them; only the server decides when these end."""
    before = server.processes
    for pid in before:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGHUP)
        os.kill(pid, signal.SIGINT)
    assert server.predict(image())[0] == 200
    assert server.processes == before


@pytest.fixture
def hanging(tiny_onnx: Path) -> Iterator[Server]:
    """A server of two requests at a time whose process has stopped."""
    with running(tiny_onnx, "--max-queue", "2", "--timeout", "3", "--max-body-mb", "1") as server:
        (pid,) = server.processes
        os.kill(pid, signal.SIGSTOP)
        yield server
        os.kill(pid, signal.SIGCONT)


def test_too_many_requests_and_too_little_time(hanging: Server) -> None:
    def begun(body: bytes, length: int) -> socket.socket:
        """A request whose body has this length, of which this is sent."""
        head = (
            f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", hanging.port), timeout=60)
        connection.sendall(head.encode() + body)
        return connection

    def answer(connection: socket.socket) -> str:
        with connection:
            return connection.recv(65_536).decode()

    # Refused by the length that it says it has, before a byte of it.
    assert answer(begun(b"", 2**20 + 1)).startswith("HTTP/1.1 413 ")
    content = image()
    waiting = [begun(content, len(content)), begun(content[:20], len(content))]
    wait_for(lambda: hanging.request("GET", "/ready")[0] == 503)
    refused = answer(begun(content, len(content)))
    assert refused.startswith("HTTP/1.1 503 ")
    assert "retry-after: 1" in refused
    assert hanging.request("GET", "/health")[0] == 200
    for connection in waiting:
        assert answer(connection).startswith("HTTP/1.1 504 ")
    assert hanging.request("GET", "/ready")[0] == 200


def test_stopped_process_is_replaced(tiny_onnx: Path) -> None:
    """Also one that does not even read the batch; those that waited for it are answered by the next."""
    with running(tiny_onnx, "--batch-timeout", "1", "--timeout", "120") as server:
        (pid,) = server.processes
        os.kill(pid, signal.SIGSTOP)
        bodies = [image(seed, (600, 600)) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(server.predict, bodies))
        assert [status for status, _ in found] == [200] * 4
        assert pid not in server.processes
        assert [server.predict(body)[1]["uncertainty"] for body in bodies] == pytest.approx(
            [answer["uncertainty"] for _, answer in found], rel=1e-5
        )
