"""Limits and refusals of the application, with a model that answers, waits or fails at will."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
pytest.importorskip("PIL")

from serve_client import call, image
from serve_stub import PNG, make, the_one

from fastgrad.deploy.file.package import PackageError
from fastgrad.deploy.serve.app import Limits, create_app
from fastgrad.deploy.serve.pool import ModelError


def post(
    app: Any, headers: dict[str, str] = PNG, chunks: list[bytes] | None = None, pause: float = 0.0
) -> Any:
    status, sent, body = call(app, "POST", "/predict", headers, chunks or [image()], pause)
    return status, sent, json.loads(body)


def test_key(tiny_package: Path) -> None:
    app = make(tiny_package, api_key="secret")
    for headers in (
        {},
        {"x-api-key": "wrong"},
        {"x-api-key": "secre"},
        {"x-api-key": "sécret"},
        {"authorization": "Basic secret"},
    ):
        status, _, answer = post(app, {**PNG, **headers})
        assert status == 401
        assert "API key" in answer["detail"]
        assert call(app, "GET", "/metrics", headers, [])[0] == 401
    for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
        assert post(app, {**PNG, **headers})[0] == 200
        assert call(app, "GET", "/metrics", headers, [])[0] == 200
    for open_path in ("/", "/health", "/ready", "/model", "/openapi.json"):
        assert call(app, "GET", open_path, {}, [])[0] in (200, 503)
    with pytest.raises(ValueError, match="api_key"):
        create_app(str(tiny_package), api_key="")


def test_key_is_compared_in_constant_time(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    app = make(tiny_package, api_key="secret")
    post(app, {**PNG, "x-api-key": "s"})
    # Equal lengths whatever was sent: what is compared are digests.
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)]


def test_no_answer_in_time_is_504_and_no_body_408(tiny_package: Path) -> None:
    app = make(tiny_package, delay=5, limits=Limits(seconds=0.1))
    status, _, answer = post(app)
    assert status == 504
    assert "0.1 s" in answer["detail"]
    assert post(app, chunks=[b"a", b"b"], pause=0.3)[0] == 408
    assert app.state.active == 0


def test_full_queue_is_503_with_retry_after(tiny_package: Path) -> None:
    app = make(tiny_package, limits=Limits(queue=2))
    app.state.active = 2
    status, sent, answer = post(app)
    assert status == 503
    assert sent["retry-after"] == "1"
    assert "too many" in answer["detail"]
    assert call(app, "GET", "/ready", {}, [])[0] == 503
    app.state.active = 0
    assert post(app)[0] == 200


def test_body_limit_holds_with_and_without_content_length(tiny_package: Path) -> None:
    app = make(tiny_package, limits=Limits(body=1000))
    assert post(app, {**PNG, "content-length": "2000"}, [bytes(1000)] * 2)[0] == 413
    assert post(app, PNG, [bytes(600)] * 3)[0] == 413
    assert post(app, {**PNG, "content-length": "10"}, [bytes(600)] * 3)[0] == 413
    assert post(app, PNG, [image()])[0] == 200


def test_pixel_limit(tiny_package: Path) -> None:
    app = make(tiny_package, limits=Limits(pixels=100))
    assert post(app, chunks=[image(size=(10, 10))])[0] == 200
    assert post(app, chunks=[image(size=(10, 11))])[0] == 413


def test_a_failing_model_is_500_in_plain_words(tiny_package: Path) -> None:
    status, _, answer = post(make(tiny_package, error=ModelError("the model failed: out of memory")))
    assert status == 500
    assert answer == {"detail": "the model failed: out of memory"}


def test_not_ready_before_the_start_and_while_draining(tiny_package: Path) -> None:
    app = create_app(str(tiny_package))
    assert post(app)[0] == 503
    app = make(tiny_package)
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


def test_several_models_answer_by_name(tiny_package: Path) -> None:
    app = create_app({"small": str(tiny_package), "second": str(tiny_package)}, false_alarm_rate=0.01)
    app.state.ready = True
    for name, model in app.state.models.items():

        async def submit(value: np.ndarray, on_run: Any, name: str = name) -> tuple[np.ndarray, float]:
            return np.array([0.1, 0.2, 0.3, 0.4]), float(len(name))

        model.served.pool.submit = submit
    for path, uncertainty in (("/predict", 5.0), ("/predict/small", 5.0), ("/predict/second", 6.0)):
        status, _, body = call(app, "POST", path, PNG, [image()])
        assert (status, json.loads(body)["uncertainty"]) == (200, uncertainty)
    for method, path in (("POST", "/predict/none"), ("GET", "/model/none"), ("GET", "/metrics/none")):
        status, _, body = call(app, method, path, PNG, [image()])
        assert status == 404
        assert json.loads(body)["detail"] == "the model must be one of small, second; it was 'none'"
    assert json.loads(call(app, "GET", "/model/second", {}, [])[2])["models"] == ["small", "second"]
    assert (
        'fastgrad_requests_total{status="200"} 1.0' in call(app, "GET", "/metrics/second", {}, [])[2].decode()
    )
    assert 'fastgrad_requests_total{status="200"} 2.0' in call(app, "GET", "/metrics", {}, [])[2].decode()
    with pytest.raises(ValueError, match="path must name at least one model"):
        create_app({})


def test_drift_reaches_the_metrics(tiny_package: Path) -> None:
    app = make(tiny_package)

    async def far_out(value: np.ndarray, on_run: Any) -> tuple[np.ndarray, float]:
        return np.array([1.0, 0.0, 0.0, 0.0]), 1e3

    the_one(app).pool.submit = far_out
    for _ in range(20):
        answer = post(app)[2]
        assert answer["reliable"] is False
    metrics = call(app, "GET", "/metrics", {}, [])[2].decode()
    assert "fastgrad_drift_alarm 1.0" in metrics
    assert "fastgrad_share_flagged 1.0" in metrics


def test_command_line_errors(tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from fastgrad.commands import serve

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    for arguments, message in (
        ([str(tmp_path / "none.pt2")], "no such file"),
        ([str(tiny_package), "--workers", "0"], "--workers must be at least 1"),
        ([str(tiny_package), "--timeout", "0"], "must be positive"),
        ([str(tiny_package), "--reload-seconds", "-1"], "--reload-seconds must be at least 0; it was -1"),
        ([], "give one MODEL, or --model NAME=PATH"),
        ([str(tiny_package), "--model", f"a={tiny_package}"], "give one MODEL, or --model NAME=PATH"),
        (["--model", str(tiny_package)], "--model must be NAME=PATH"),
        (["--model", f"a={tiny_package}", "--model", f"a={tiny_package}"], "each name once"),
        (["--model", f"a/b={tiny_package}"], "one was 'a/b'"),
        ([str(tiny_package), "--false-alarm-rate", "0.5"], "false_alarm_rate must be one"),
        ([str(tiny_package), "--api-key-file", str(tmp_path / "key")], "No such file"),
    ):
        assert serve.run(parser.parse_args(arguments)) == 2
        assert message in capsys.readouterr().err
    assert parser.parse_args([str(tiny_package)]).host == "127.0.0.1"
    with pytest.raises(PackageError):
        create_app(str(tmp_path / "none.pt2"))
