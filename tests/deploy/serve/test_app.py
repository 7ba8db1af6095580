"""Limits and refusals of the application, with a model that answers, waits or fails at will."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_models import write_archive
from serve_client import acall, call, image, unhurried
from serve_stub import PNG, make, stub, the_one

from fastgrad.commands import cli, serve
from fastgrad.deploy.error_rate import error_rate
from fastgrad.deploy.file.package import Description
from fastgrad.deploy.serve.app import create_app
from fastgrad.deploy.serve.bodies import Limits, Readers
from fastgrad.deploy.serve.child import ChildDiedError, RequestError
from fastgrad.deploy.serve.decoder import read_input
from fastgrad.deploy.serve.guard import Guard


def post(
    app: Any, headers: dict[str, str] = PNG, chunks: list[bytes] | None = None, pause: float = 0.0, **more: Any
) -> Any:
    status, sent, body = call(app, "POST", "/predict", headers, chunks or [image()], pause, **more)
    return status, sent, json.loads(body)


CLOSED = [
    ("GET", "/metrics"), ("GET", "/model"), ("GET", "/model/none"), ("GET", "/openapi.json"), ("GET", "/drift"),
    ("GET", "/metrics/none"), ("POST", "/drift?action=reset&reason=x"), ("POST", "/predict/none"), ("GET", "/none"),
]  # fmt: skip


def test_key(tiny_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = make(tiny_package, api_key="secret")
    wrong = ("Bearer wrong", "Bearer secre", "Bearer sécret", "Basic secret", "secret", "Bearer")
    for headers in ({}, *({"authorization": value} for value in wrong), {"x-api-key": "secret"}):
        status, sent, answer = post(app, {**PNG, **headers})
        assert status == 401
        assert "API key" in answer["detail"]
        assert sent["www-authenticate"] == "Bearer"
        # No name of a model, no path is told before the key is right.
        for method, path in CLOSED:
            assert call(app, method, path, headers, [])[0] == 401, path
    right = {"authorization": "Bearer secret"}
    assert post(app, {**PNG, **right})[0] == 200
    for method, path in CLOSED:
        assert call(app, method, path, right, [])[0] in (200, 404, 422)
    for open_path in ("/", "/health", "/ready"):
        assert call(app, "GET", open_path, {}, [])[0] in (200, 503)
    for key in ("", " ", "secret\n", "sécret"):
        with pytest.raises(ValueError, match="api_key must not be empty, and of printable ASCII"):
            create_app(str(tiny_package), api_key=key)
        with pytest.raises(ValueError, match="api_key"):
            Guard(key, ())
    # One line for the first, and the others are counted for a later one.
    assert caplog.text.count("without the right API key") == 1
    assert " 1 request without the right API key, the last from 127.0.0.1" in caplog.text
    assert 'fastgrad_requests_total{status="401"} 80.0' in the_one(app).metrics.render().decode()


def test_constant_time_of_the_key(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    post(make(tiny_package, api_key="secret"), {**PNG, "authorization": "Bearer s"})
    # Equal lengths whatever was sent: what is compared are digests.
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)]


def test_guard_of_one_route() -> None:
    """Ray Serve's deployment answers where it is put, also at ``/``."""
    guard = Guard("secret", ())
    for path in ("/", "/ready", "/predict"):
        with pytest.raises(RequestError, match="API key"):
            guard.check({"type": "http", "method": "POST", "path": path, "headers": []})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 400),
        ({"host": "evil.example:8000"}, 400),
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"host": "localhost:8000"}, 200),
        ({"host": "192.168.1.7:80"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "Models.Example"}, 200),
        ({"host": "other.example:8000"}, 200),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "["}, 400),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "models.example", "origin": "https://models.example"}, 200),
    ],
)
def test_hosts_and_origins(tiny_package: Path, headers: dict[str, str], status: int) -> None:
    app = make(tiny_package, allowed_hosts=["models.example", "Other.example:8000"])
    assert post(app, {**PNG, **headers})[0] == status


def test_error_names_no_path(tiny_package: Path) -> None:
    app = make(tiny_package, error=RuntimeError(f"cannot open {tiny_package}"))
    sent: list[dict[str, Any]] = []
    with pytest.raises(RuntimeError, match="cannot open"):
        call(app, "POST", "/predict", PNG, [image()], sent=sent)
    assert [message["status"] for message in sent if "status" in message] == [500]
    assert sent[-1]["body"] == b'{"detail":"the server failed; its log says why"}'
    assert 'fastgrad_requests_total{status="500"} 1.0' in the_one(app).metrics.render().decode()


SECONDS, BODY = {"limits": Limits(seconds=0.1)}, {"limits": Limits(body=1000)}
PARTS: dict[str, Any] = {"chunks": [bytes(600)] * 3}


@pytest.mark.parametrize(
    ("options", "sent", "status", "detail"),
    [
        ({"delay": 5, **SECONDS}, {}, 504, "no answer within 0.1 s"),
        (SECONDS, {"chunks": [b"a", b"b"], "pause": 0.3}, 408, "the body did not arrive within 0.1 s"),
        (BODY, {"headers": {**PNG, "content-length": "2000"}}, 413, "the body is too large"),
        (BODY, PARTS, 413, "the body is too large"),
        (BODY, {"headers": {**PNG, "content-length": "10"}, **PARTS}, 413, "the body is too large"),
        (BODY, {}, 200, ""),
        ({"error": ChildDiedError("it ended")}, {}, 500, "the model failed on this input: it ended"),
    ],
)
def test_limits(options: dict[str, Any], sent: dict[str, Any], status: int, detail: str, tiny_package: Path) -> None:
    app = make(tiny_package, **options)
    found, _, answer = post(app, **sent)
    assert found == status
    assert answer.get("detail", "").startswith(detail)
    assert app.state.readers.active == 0


def test_slow_body_takes_no_slot(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad.deploy.serve.bodies._GRACE", 0.2)
    app = make(tiny_package, limits=Limits(queue=1, rate=1000))
    seen = []
    status, _, answer = post(app, chunks=[b"x"] * 10, pause=0.1, watch=lambda: seen.append(app.state.readers.active))
    assert (status, set(seen)) == (408, {0})
    assert "slower than 1000 bytes a second" in answer["detail"]
    # A body that keeps up may take longer than that.
    assert post(app, chunks=[image()] + [bytes(200)] * 4, pause=0.1)[0] in (200, 400)


def test_memory_of_all_bodies(tiny_package: Path) -> None:
    app = make(tiny_package, delay=0.5, limits=Limits(memory=1000, body=800))

    async def both() -> list[int]:
        bodies = ([image()], [bytes(700), bytes(90)], [bytes(700), bytes(90)])
        answers = [acall(app, "POST", "/predict", PNG, body, pause=0.05) for body in bodies]
        return [status for status, _, _ in await asyncio.gather(*answers)]

    assert sorted(unhurried(both())) == [200, 400, 503]
    assert post(app)[0] == 200


def test_other_methods(tiny_package: Path) -> None:
    app = make(tiny_package)
    for path, methods in (("/drift", "GET, POST"), ("/drift/any", "GET, POST"), ("/predict", "POST"), ("/", "GET")):
        status, sent, body = call(app, "DELETE", path, {}, [])
        assert (status, sent["allow"], json.loads(body)) == (405, methods, {"detail": "Method Not Allowed"}), path


def test_full_queue_is_503(tiny_package: Path) -> None:
    app = make(tiny_package, limits=Limits(queue=2))
    app.state.readers.active = 2
    status, sent, answer = post(app)
    assert status == 503
    assert sent["retry-after"] == "1"
    assert "too many" in answer["detail"]
    assert call(app, "GET", "/ready", {}, [])[0] == 503
    app.state.readers.active = 0
    assert post(app)[0] == 200


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_beyond_the_dtype(dtype: str) -> None:
    """JSON has no infinity, but numbers that Python reads as one."""
    for value, fits in ((b"65504", True), (b"1e39", dtype == "float64"), (b"-1e999", False)):
        with contextlib.nullcontext() if fits else pytest.raises(RequestError, match=f"finite numbers of type {dtype}"):
            read_input("application/json", b'{"inputs": [%s]}' % value, (1,), dtype, max_pixels=1)


def test_readiness(tiny_package: Path) -> None:
    app = create_app(str(tiny_package))
    assert post(app)[0] == 503
    app = make(tiny_package)
    assert "connection" not in post(app)[1]
    app.state.draining = True
    assert call(app, "GET", "/ready", {}, [])[0] == 503
    assert call(app, "GET", "/health", {}, [])[0] == 200
    status, sent, _ = post(app)
    assert status == 200
    assert sent["connection"] == "close"


def test_threshold_at_another_rate(tiny_package: Path) -> None:
    model = json.loads(call(make(tiny_package, false_alarm_rate=0.01), "GET", "/model", {}, [])[2])
    default = json.loads(call(make(tiny_package), "GET", "/model", {}, [])[2])
    assert model["threshold"] > default["threshold"]
    assert (model["false_alarm_rate"], default["false_alarm_rate"]) == (0.01, 0.05)
    with pytest.raises(ValueError, match="false_alarm_rate"):
        create_app(str(tiny_package), false_alarm_rate=0.33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads must be an integer of at least 1; it was 0"),
        ({"batch_wait": float("nan")}, r"batch_wait must lie in \[0, inf\); it was nan"),
        ({"batch_wait": -1.0}, r"batch_wait must lie in \[0, inf\); it was -1"),
        ({"allowed_hosts": "example.com"}, "allowed_hosts must be a list of names .*; it was 'example.com'"),
        ({"allowed_hosts": [1]}, r"allowed_hosts must be a list of names .*; it was \[1\]"),
        ({"allowed_hosts": ["https://a.example"]}, "allowed_hosts must be .*; it was .'https://a.example'"),
        ({"allowed_hosts": ["a.example", "*"]}, r"allowed_hosts must be .*; it was .'a.example', '\*'"),
        ({"allowed_hosts": [""]}, "allowed_hosts must be .*; it was .''"),
        ({"api_key": 3}, "api_key must not be empty, and of printable ASCII"),
        ({"path": None}, "path must be a path; it was None"),
        ({"path": {"small": 3}}, "path must be a path; it was 3"),
        ({"path": {3: "model.pt2"}}, "path must have names of letters"),
        ({"batch_wait": "1"}, "batch_wait must be a number; it was '1'"),
        ({"drift_false_alarm_rate": 2}, r"drift_false_alarm_rate must lie in \(0, 1\); it was 2"),
        ({"false_alarm_rate": "5 %"}, "false_alarm_rate must be a number; it was '5 %'"),
        (
            {"sha256": [("other", "0" * 64)]},
            "sha256 must pair tiny with 64 hexadecimal digits; one pair was 'other', '00",
        ),
        (
            {"sha256": [("tiny", "0" * 63)]},
            "sha256 must pair tiny with 64 hexadecimal digits; one pair was 'tiny', '00",
        ),
        ({"limits": {}}, "limits must be a Limits; it was dict"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, tiny_package: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        create_app(**{"path": tiny_package, **change})


def test_limits_are_numbers() -> None:
    for value in ("1", None, True, float("nan"), 0):
        with pytest.raises((TypeError, ValueError), match=r"seconds must (be a number|lie in)"):
            Limits(seconds=value)  # type: ignore[arg-type]
    # As JSON, which the processes get them as, does not have them.
    assert Readers(1, Limits(pixels=np.int64(7))).pool.workers  # type: ignore[arg-type]


def test_several_models_answer_by_name(tiny_package: Path) -> None:
    app = create_app({"small": str(tiny_package), "second": str(tiny_package)}, false_alarm_rate=0.01)
    stub(app, {name: (0.1, 0.2, 0.3, 0.4, len(name), 0.5, 0.5) for name in ("small", "second")})
    for path, uncertainty in (("/predict", 5.0), ("/predict/small", 5.0), ("/predict/second", 6.0)):
        status, _, body = call(app, "POST", path, PNG, [image()])
        assert (status, json.loads(body)["uncertainty"]) == (200, uncertainty)
    for method, path in (("POST", "/predict/none"), ("GET", "/model/none"), ("GET", "/metrics/none")):
        status, _, body = call(app, method, path, PNG, [image()])
        assert status == 404
        assert json.loads(body)["detail"] == "the model must be one of small, second; it was 'none'"
    assert json.loads(call(app, "GET", "/model/second", {}, [])[2])["models"] == ["small", "second"]
    assert 'fastgrad_requests_total{status="200"} 1.0' in call(app, "GET", "/metrics/second", {}, [])[2].decode()
    assert 'fastgrad_requests_total{status="200"} 2.0' in call(app, "GET", "/metrics", {}, [])[2].decode()
    with pytest.raises(ValueError, match="path must name at least one model"):
        create_app({})


def test_drift_alarm_and_reset(tiny_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = stub(create_app(str(tiny_package)), {"tiny": (1.0, 0.0, 0.0, 0.0, 1e3, 0.5, 0.5)})
    for _ in range(20):
        answer = post(app)[2]
        assert answer["reliable"] is False
    metrics = call(app, "GET", "/metrics", {}, [])[2].decode()
    assert "fastgrad_drift_alarm 1.0" in metrics
    assert "fastgrad_share_flagged 1.0" in metrics

    def drift(action: str | None = None, reason: str = "") -> tuple[int, Any]:
        query = "" if action is None else f"?action={action}&reason={reason}"
        status, _, body = call(app, "GET" if action is None else "POST", "/drift" + query, {}, [])
        return status, json.loads(body)

    _, state = drift()
    assert (state["alarm"], state["count"]) == (True, 20)
    assert "of 20 inputs, compared with 100 clean ones" in state["summary"]
    assert "at most 0.01" in state["summary"]
    assert drift("reset", "")[0] == 422
    assert drift("forget", "x")[0] == 422
    _, state = drift("reset", "camera is back")
    assert (state["alarm"], state["count"]) == (False, 0)
    assert "drift: reset, because 'camera is back'" in caplog.text


def test_risk_reaches_the_answer(tmp_path: Path) -> None:
    for risk, row, expected in ((True, [0.9, 0.1, 2.0, 0.25], 0.25), (False, [0.9, 0.1, 2.0], None)):
        path = write_archive(tmp_path / f"{risk}.pt2", Description((3, 8, 8), "float32", 2, 8, "cpu", risk=risk))
        app = stub(create_app(str(path)), {str(risk): row})
        assert post(app)[2]["risk"] == expected
        assert json.loads(call(app, "GET", "/model", {}, [])[2])["risk"] is risk
        assert b"no scores to compare with" in call(app, "GET", "/drift", {}, [])[2]


def test_accepted_and_error_rate(tmp_path: Path) -> None:
    reference = {"edges": [1.0, 2.0], "counts": [10.0, 10.0, 10.0]}
    known = {"risk": True, "reference": reference, "risk_threshold": 0.25, "excess": 0.1}
    path = write_archive(tmp_path / "m.pt2", Description((3, 8, 8), "float32", 2, 8, "cpu", **known))
    app = create_app(str(path))

    def drift() -> Any:
        return json.loads(call(app, "GET", "/drift", {}, [])[2])["error_rate"]

    for risk, uncertainty, accepted in ((0.25, 0.5, True), (0.26, 1.0, False)):
        stub(app, {"m": [0.9, 0.1, uncertainty, risk]})
        assert post(app)[2]["accepted"] is accepted
    assert json.loads(call(app, "GET", "/model", {}, [])[2])["risk_threshold"] == 0.25
    assert drift() is None
    assert b"fastgrad_error_rate NaN" in call(app, "GET", "/metrics", {}, [])[2]
    for _ in range(28):
        post(app)
    expected = error_rate([0.25] + [0.26] * 29, [0.5] + [1.0] * 29, 0.1)
    assert drift() == expected._asdict()
    assert f"fastgrad_error_rate_high {expected.high}" in call(app, "GET", "/metrics", {}, [])[2].decode()


def test_command_line_errors(tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, marked = str(tiny_package), tmp_path / "marked"
    marked.write_text("secret\r\n", "utf-8-sig")
    zeros, positive = "0" * 64, "must be positive and finite; it was"
    for arguments, message in (
        ("--max-body-mb nan", f"--max-body-mb {positive} nan"),
        ("--drain-seconds -1", f"--drain-seconds {positive} -1"),
        ("--timeout inf", f"--timeout {positive} inf"),
        ("--batch-wait-ms nan", "--batch-wait-ms must be from 0 to 60000; it was nan"),
        ("--port 65536", "--port must be from 0 to 65535; it was 65536"),
        (f"--sha256 {zeros}", "one pair was '', '000"),
        (f"--sha256 tiny={zeros}", "must have the SHA-256 000"),
        (f"--model a={file}", "give one MODEL, or --model NAME=PATH"),
        ("--false-alarm-rate 0.5", "false_alarm_rate must be one"),
        # Less than a byte is one, which the limits allow.
        ("--max-body-mb 1e-9 --drift-false-alarm-rate 0", "drift_false_alarm_rate must lie in"),
        (f"--api-key-file {tmp_path / 'key'}", "No such file"),
        (f"--api-key-file {os.devnull}", "api_key must not be empty"),
        # Of bytes that are no text.
        (f"--api-key-file {file}", "api_key must not be empty"),
        ("--max-model-mb 1e-3", "bytes or more; at most 1049 are read"),
        # A key in a file that Windows marks as UTF-8 is one.
        (f"--api-key-file {marked} --sha256 tiny={zeros}", "must have the SHA-256 000"),
    ):
        assert cli.main(["serve", file, *arguments.split()]) == 2, arguments
        assert message in capsys.readouterr().err
    for arguments, message in (
        (f"--model {file}", "--model must be NAME=PATH"),
        (f"--model a={file} --model a={file}", "each name once"),
        (f"--model a/b={file}", "one was 'a/b'"),
    ):
        assert cli.main(["serve", *arguments.split()]) == 2, arguments
        assert message in capsys.readouterr().err
    # Every option that must be positive is checked.
    for name, *_ in serve._POSITIVE:
        assert cli.main(["serve", file, name, "0"]) == 2
        assert f"{name} {positive} 0" in capsys.readouterr().err


def test_default_host() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert parser.parse_args(["model.pt2"]).host == "127.0.0.1"
