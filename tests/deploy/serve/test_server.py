"""The running server: answers, refusals, and that it goes on answering."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
pytest.importorskip("PIL")

from serve_client import Server, form, image, running

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage


@pytest.fixture(scope="module")
def server(model_file: Path) -> Iterator[Server]:
    with running(model_file) as started:
        yield started


@pytest.fixture(scope="module")
def package(model_file: Path) -> ModelPackage:
    return ModelPackage(model_file)


def check(answer: dict, package: ModelPackage, x: torch.Tensor) -> None:
    direct = package(x[None])
    assert set(answer) == {"class", "label", "probabilities", "uncertainty", "reliable", "evidence", "alarm"}
    assert answer["evidence"] is answer["alarm"] is None
    assert answer["class"] == int(direct.probabilities[0].argmax())
    assert answer["label"] == package.description.labels[answer["class"]]
    # Batches of other sizes may sum in another order.
    np.testing.assert_allclose(answer["probabilities"], direct.probabilities[0].numpy(), rtol=1e-5)
    assert answer["uncertainty"] == pytest.approx(float(direct.uncertainty), rel=1e-5, abs=1e-5)
    assert answer["reliable"] == (answer["uncertainty"] <= package.description.threshold)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("size", [(8, 8), (37, 20)])
def test_image_body(server: Server, package: ModelPackage, kind: str, size: tuple[int, int]) -> None:
    content = image(1, size, kind)
    status, answer = server.predict(content, f"image/{kind.lower()}")
    assert status == 200, answer
    check(answer, package, decode_image(content, package.description))


def test_form_with_a_file(server: Server, package: ModelPackage) -> None:
    content = image(2)
    status, answer = server.predict(*form("file", content))
    assert status == 200, answer
    check(answer, package, decode_image(content, package.description))


@pytest.mark.parametrize("batched", [False, True])
def test_json_inputs(server: Server, package: ModelPackage, batched: bool) -> None:
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    inputs = x[None].tolist() if batched else x.tolist()
    status, answer = server.predict(json.dumps({"inputs": inputs}), "application/json; charset=utf-8")
    assert status == 200, answer
    check(answer, package, x)


def test_evidence_of_a_file_that_gives_it(tiny_explained: Path) -> None:
    package = ModelPackage(tiny_explained)
    with running(tiny_explained) as server:
        status, answer = server.predict(image(3), "image/png")
        model = json.loads(server.request("GET", "/model")[1])
    assert status == 200
    x = decode_image(image(3), package.description)
    _, direct = package.explain(x[None])
    assert answer["evidence"] == pytest.approx({name: float(own) for name, own in direct.items()}, rel=1e-5)
    assert (answer["alarm"] is None) == answer["reliable"]
    assert model["evidence"] == package.description.evidence


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in 3 MB; 2.7 GB when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(30_000 * 3 + 1) * 1000, 9)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def nested(value: str) -> str:
    return json.dumps({"inputs": np.zeros((3, 8, 8)).tolist()}).replace("0.0", value, 1)


BAD = {
    "empty body": (b"", "image/png", 400, "empty"),
    "not an image": (b"hello, this is text", "image/png", 400, "cannot be read"),
    "truncated image": (image(0, (64, 64))[:200], "image/png", 400, "cannot be read"),
    "100 MB body": (bytes(100 * 2**20), "image/png", 413, "too large"),
    "decompression bomb": (bomb(), "image/png", 413, "pixels"),
    "wrong content type": (image(), "text/html", 415, "text/html"),
    "no content type": (image(), "", 415, "missing"),
    "form without file": (*form("picture", image()), 422, "'file'"),
    "form without boundary": (form("file", image())[0], "multipart/form-data", 400, "form"),
    "broken form": (b"--frontier\r\nno headers", "multipart/form-data; boundary=frontier", 400, "form|image"),
    "form with text": (b"", "multipart/form-data; boundary=x", 400, "empty"),
    "not JSON": (b"{", "application/json", 400, "not valid JSON"),
    "not UTF-8": (b'{"inputs": "\xff"}', "application/json", 400, "not valid JSON"),
    "JSON array": (b"[1]", "application/json", 422, "object"),
    "missing key": (b'{"input": [1]}', "application/json", 422, '"inputs"'),
    "wrong size": (b'{"inputs": [[1, 2], [3, 4]]}', "application/json", 422, r"shape \[3, 8, 8\]"),
    "ragged": (b'{"inputs": [[1, 2], [3]]}', "application/json", 422, "ragged"),
    "text inside": (nested('"a"'), "application/json", 422, "something else"),
    "null inside": (nested("null"), "application/json", 422, "something else"),
    "NaN": (nested("NaN"), "application/json", 422, "finite"),
    "infinity": (nested("-Infinity"), "application/json", 422, "finite"),
    "beyond float64": (nested("1e999"), "application/json", 422, "finite"),
    "beyond float32": (nested("1e39"), "application/json", 422, "finite"),
    "result overflows": (nested("1e38"), "application/json", 422, "finite"),
    "huge integer": (nested("1" * 400), "application/json", 422, "finite|something else|numbers"),
    "too many digits": (nested("1" * 5000), "application/json", 400, "JSON"),
    "nested too deeply": (b'{"inputs": ' + b"[" * 100_000, "application/json", 400, "deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_reason(server: Server, name: str) -> None:
    body, content_type, status, message = BAD[name]
    got, answer = server.predict(body, content_type)
    assert got == status, answer
    assert re.search(message, answer["detail"]), answer
    assert "Traceback" not in answer["detail"]
    assert len(answer["detail"]) < 400
    assert server.predict(image(), "image/png")[0] == 200


def test_wrong_method_and_path(server: Server) -> None:
    assert server.request("GET", "/predict")[0] == 405
    assert server.request("GET", "/nothing")[0] == 404


def test_health_ready_model_and_openapi(server: Server) -> None:
    assert server.request("GET", "/health")[0] == 200
    assert server.request("GET", "/ready")[0] == 200
    model = json.loads(server.request("GET", "/model")[1])
    assert model["labels"] == ["cat", "dog", "cow", "hen"]
    assert len(model["histogram"]["counts"]) + 1 == len(model["histogram"]["edges"])
    openapi = json.loads(server.request("GET", "/openapi.json")[1])
    operation = openapi["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"image/*", "multipart/form-data", "application/json"}
    assert {"200", "401", "413", "415", "422", "503", "504"} <= set(operation["responses"])
    assert {"/health", "/ready", "/metrics", "/predict"} <= set(openapi["paths"])


def test_metrics_count_what_happened(server: Server) -> None:
    before = server.metric('fastgrad_requests_total{status="200"}')
    flagged = server.metric("fastgrad_drift_scores")
    for seed in range(5):
        assert server.predict(image(seed), "image/png")[0] == 200
    assert server.metric('fastgrad_requests_total{status="200"}') == before + 5
    assert server.metric("fastgrad_drift_scores") == flagged + 5
    for name in ("request_seconds_count", "uncertainty_count"):
        assert server.metric(f"fastgrad_{name}") >= before + 5
    assert 1 <= server.metric("fastgrad_batch_size_count") <= server.metric("fastgrad_uncertainty_count")
    assert 0 < server.metric("fastgrad_expected_share_flagged") < 1
    assert 0 <= server.metric("fastgrad_share_flagged") <= 1
    assert server.metric("fastgrad_drift_evidence") > 0
    for name in ("drift_alarm", "queue_length", "worker_restarts"):
        assert server.metric(f"fastgrad_{name}") == 0


def test_page_is_self_contained(server: Server) -> None:
    status, page = server.request("GET", "/")
    assert status == 200
    text = page.decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_decoding_scales_the_centered_part(package: ModelPackage) -> None:
    from PIL import Image

    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 255
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    x = decode_image(out.getvalue(), package.description)
    assert x.shape == (3, 8, 8)
    assert torch.all(x == 2.0)  # (1 - 0.5) / 0.25: only the white middle is left
