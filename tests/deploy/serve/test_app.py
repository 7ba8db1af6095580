"""Limits and refusals of the application, with processes that answer, wait or fail at will."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from pathlib import Path
from typing import Any

import pytest
from deploy_models import write_archive
from pebble import ProcessExpired
from serve_client import call
from serve_fake import PNG, FakeProcess, faked, posts

from fastgrad.commands import cli
from fastgrad.deploy.error_rate import error_rate
from fastgrad.deploy.file.package import Description
from fastgrad.deploy.serve.app import create_app


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that has a description, which is all that the web process reads."""
    reference = {"edges": [1.0, 2.0], "counts": [10.0, 10.0, 10.0]}
    known: dict[str, Any] = {"risk": True, "reference": reference, "risk_threshold": 0.25, "wrong_above": 0.2}
    known |= {"threshold": 2.0, "false_alarm_rate": 0.05, "thresholds": [(0.01, 3.0), (0.05, 2.0)]}
    return write_archive(tmp_path / "model.pt2", Description((3, 8, 8), "float32", 1, 8, "cpu", **known))


PATHS = [
    ("GET", "/metrics"), ("GET", "/model"), ("GET", "/openapi.json"), ("GET", "/drift"), ("GET", "/none"),
    ("POST", "/drift?action=reset&reason=x"), ("POST", "/none"),
]  # fmt: skip


def test_key(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = faked(path, api_key="secret")
    wrong = ("Bearer wrong", "Bearer secre", "Bearer sécret", "Basic secret", "secret", "Bearer")
    requests = [{}, *({"authorization": value} for value in wrong), {"x-api-key": "secret"}]
    for headers in requests:
        ((status, sent, answer),) = posts(app, (headers, [b"x"]))
        assert (status, sent["www-authenticate"]) == (401, "Bearer")
        assert "API key" in answer["detail"]
        # No path is told before the key is right.
        assert {call(app, method, other, headers)[0] for method, other in PATHS} == {401}
    right = {"authorization": "Bearer secret"}
    assert posts(app, (right, [b"x"]))[0][0] == 200
    assert [call(app, method, other, right)[0] for method, other in PATHS] == [200, 200, 200, 200, 404, 200, 404]
    assert [call(app, "GET", other, {})[0] for other in ("/", "/health", "/ready")] == [200, 200, 503]
    for key in ("", " ", "secret\n", "sécret", 3):
        with pytest.raises(ValueError, match="api_key must not be empty, and of printable ASCII"):
            create_app(path, api_key=key)  # type: ignore[arg-type]
    # Of 64 refusals the log has the first, second, fourth and so on, with the connection's own address.
    assert caplog.text.count("without the right API key") == 7
    assert "this one from '127.0.0.1'" in caplog.text
    assert 'fastgrad_requests_total{status="401"} 64.0' in call(app, "GET", "/metrics", right)[2].decode()


def test_constant_time_of_the_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    call(faked(path, api_key="secret"), "GET", "/model", {"authorization": "Bearer s"})
    # Equal lengths whatever was sent: what is compared are digests.
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example:8000"}, 400),
        ({"host": "192.168.1.7"}, 400),
        ({"host": "["}, 400),
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "Models.Example:80"}, 200),
        ({"host": "a.b.example"}, 200),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "models.example", "origin": "https://models.example"}, 200),
    ],
)
def test_hosts_and_origins(path: Path, headers: dict[str, str], status: int) -> None:
    app = faked(path, allowed_hosts=["models.example", "*.b.example"])
    assert call(app, "POST", "/drift?action=reset&reason=x", headers)[0] == status


@pytest.mark.parametrize(
    ("options", "request_", "status", "detail"),
    [
        ({"max_body": 1000}, ({"content-length": "2000"}, [b"x"]), 413, "the body is too large; at most 1000 bytes"),
        ({"max_body": 1000}, ({}, [bytes(600)] * 3), 413, "the body is too large"),
        ({"max_body": 1000}, ({"content-length": "10"}, [bytes(600)] * 3), 413, "the body is too large"),
        ({"max_body": 1000}, ({"content-length": "1000"}, [bytes(500)] * 2), 200, None),
        ({"max_held": 1000}, ({"content-length": "2000"}, [b"x"]), 503, "the bodies of other requests fill"),
        ({"max_held": 1000}, ({}, [bytes(600)] * 2), 503, "the bodies of other requests fill"),
        ({"timeout": 0.1}, ({}, [b"a", b"b", b"c"]), 504, "no answer within 0.1 s"),
    ],
)
def test_limits(options: dict[str, Any], request_: Any, status: int, detail: str | None, path: Path) -> None:
    app = faked(path, **options)
    ((found, sent, answer),) = posts(app, request_, pause=0.05)
    assert found == status, answer
    assert detail is None or answer["detail"].startswith(detail)
    assert (sent.get("retry-after") == "1") == (status == 503)
    # Nothing of a refused request is counted any longer.
    assert posts(app, b"again")[0][0] == 200


def test_bodies_of_all_requests(path: Path) -> None:
    app = faked(path, FakeProcess(delay=0.2), max_held=1500, max_queue=3)
    found = posts(app, *[({}, [bytes(300), bytes(300)])] * 3, pause=0.02)
    assert sorted(status for status, *_ in found) == [200, 200, 503]
    assert sorted(status for status, *_ in posts(app, *[b"x"] * 5)) == [200, 200, 200, 503, 503]


def test_client_that_goes_away(path: Path) -> None:
    ((status, _, answer),) = posts(faked(path), ({"content-length": "10"}, []))
    assert (status, answer["detail"]) == (400, "the connection closed before the whole body came")


EXPIRED = ProcessExpired("killed", 0, 0)


@pytest.mark.parametrize(
    ("error", "runs", "starts", "logged"),
    [
        (EXPIRED, 3, 5, "a process is replaced: killed"),
        (TimeoutError(), 1, 3, "a process is replaced: no answer within 10 s"),
        (ValueError("/a/path"), 1, 1, "/a/path"),
    ],
    ids=["ends", "slow", "fails"],
)
def test_one_input_harms_no_other(
    error: Exception, runs: int, starts: int, logged: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs again alone, so often, while the others of its batch are answered, each with its own."""
    process = FakeProcess({b"poison": error}, delay=0.05)
    bodies = [b"first", *(b"%d" % number for number in range(6)), b"poison"]
    found = posts(faked(path, process), *bodies)
    assert [answer["label"] for _, _, answer in found[:-1]] == [body.decode() for body in bodies[:-1]]
    assert found[-1][0] == 500
    assert "/a/path" not in found[-1][2]["detail"]
    assert process.batches.count([b"poison"]) == runs
    assert process.starts == starts
    assert logged in caplog.text


def test_batches_of_what_waits(path: Path) -> None:
    process = FakeProcess(delay=0.05)
    bodies = [b"%d" % number for number in range(20)]
    found = posts(faked(path, process, max_batch=5), *bodies)
    assert [answer["label"] for *_, answer in found] == [body.decode() for body in bodies]
    assert max(map(len, process.batches)) == 5
    # No more than the file allows.
    posts(faked(path, process), *bodies)
    assert max(map(len, process.batches)) == 8


def test_two_processes_share_the_work(path: Path) -> None:
    pair = FakeProcess(delay=0.05), FakeProcess(delay=0.05)
    found = posts(faked(path, *pair, max_batch=1), *[b"x"] * 8)
    assert {status for status, *_ in found} == {200}
    assert all(process.batches for process in pair)


def test_large_bodies_share_no_batch(path: Path) -> None:
    process = FakeProcess(delay=0.05)
    posts(faked(path, process), b"first", *[bytes(9 * 2**20)] * 4)
    assert sum(map(len, process.batches)) == 5
    assert all(sum(map(len, batch)) <= 16 * 2**20 for batch in process.batches)


def test_request_that_ran_out_of_time_is_not_run(path: Path) -> None:
    process = FakeProcess(delay=0.3)
    app = faked(path, process, timeout=0.1)
    assert {status for status, *_ in posts(app, b"first", ({}, [b"second"]))} == {504}
    assert [b"second"] not in process.batches


def test_readiness(path: Path) -> None:
    app = faked(path)

    async def run() -> list[Any]:
        from serve_client import acall

        statuses = [(await acall(app, "GET", "/ready", {}))[0]]
        await app.state.batcher.start()
        statuses.append((await acall(app, "GET", "/ready", {}))[0])
        _, headers, _ = await acall(app, "POST", "/predict", PNG, [b"x"])
        assert "connection" not in headers
        app.state.draining = True
        statuses.append((await acall(app, "GET", "/ready", {}))[0])
        status, headers, _ = await acall(app, "POST", "/predict", PNG, [b"x"])
        await app.state.batcher.stop()
        return [*statuses, status, headers["connection"]]

    assert asyncio.run(run()) == [503, 200, 503, 200, "close"]


def test_threshold_at_another_rate(path: Path) -> None:
    for rate, threshold in ((None, 2.0), (0.01, 3.0)):
        model = json.loads(call(create_app(path, false_alarm_rate=rate), "GET", "/model", {})[2])
        assert (model["threshold"], model["false_alarm_rate"]) == (threshold, rate or 0.05)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("path", None), ("workers", 0), ("threads", 0), ("max_batch", True), ("max_queue", 1.5), ("max_body", "1"),
        ("max_held", 0), ("max_pixels", 0), ("timeout", 0), ("batch_timeout", float("nan")),
        ("drift_false_alarm_rate", 2), ("false_alarm_rate", "5 %"), ("false_alarm_rate", 0.33), ("sha256", ["0" * 63]),
        ("sha256", "0" * 64), ("allowed_hosts", "example.com"), ("allowed_hosts", [None, ""]), ("allowed_hosts", [""]),
        ("allowed_hosts", ["https://a.example"]), ("allowed_hosts", ["a.*"]), ("api_key", ""),
    ],
)  # fmt: skip
def test_bad_arguments(argument: str, bad: Any, path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{argument} must .* was|{argument} must not be empty"):
        create_app(**{"path": path, argument: bad})


def test_drift_alarm_and_reset(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = faked(path, FakeProcess(uncertainty=1e3, reliable=False, risk=0.5))
    posts(app, *[b"x"] * 30)
    metrics = call(app, "GET", "/metrics", {})[2].decode()
    assert "fastgrad_drift_alarm 1.0" in metrics
    assert "fastgrad_share_flagged 1.0" in metrics

    def drift(method: str, query: str = "") -> tuple[int, Any]:
        status, _, body = call(app, method, "/drift" + query, {})
        return status, json.loads(body)

    _, state = drift("GET")
    assert (state["alarm"], state["count"]) == (True, 30)
    assert "at most 0.01" in state["summary"]
    assert drift("POST", "?action=reset&reason=")[0] == drift("POST", "?action=forget&reason=x")[0] == 422
    _, state = drift("POST", "?action=reset&reason=camera is back")
    assert (state["alarm"], state["count"]) == (False, 0)
    assert "drift: reset, because 'camera is back'" in caplog.text


def test_error_rate(path: Path, tmp_path: Path) -> None:
    app = faked(path, FakeProcess(uncertainty=1.0, risk=0.25))
    assert json.loads(call(app, "GET", "/drift", {})[2])["error_rate"] is None
    assert b"fastgrad_error_rate NaN" in call(app, "GET", "/metrics", {})[2]
    posts(app, *[b"x"] * 30)
    expected = error_rate([0.25] * 30, [1.0] * 30, 0.2, 30)
    assert json.loads(call(app, "GET", "/drift", {})[2])["error_rate"] == expected._asdict()
    assert f"fastgrad_error_rate_high {expected.high}" in call(app, "GET", "/metrics", {})[2].decode()
    bare = write_archive(tmp_path / "bare.pt2", Description((3, 8, 8), "float32", 2, 8, "cpu"))
    assert call(create_app(bare), "GET", "/drift", {})[0] == 404


def test_command_line_errors(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked, zeros = tmp_path / "marked", "0" * 64
    marked.write_text("secret\r\n", "utf-8-sig")
    for arguments, message in (
        ("--max-body-mb nan", "max_body_mb must lie in (0, inf); it was nan"),
        ("--drain-seconds -1", "drain_seconds must lie in (0, inf); it was -1"),
        ("--timeout inf", "timeout must lie in (0, inf); it was inf"),
        ("--port 65536", "--port must be from 0 to 65535; it was 65536"),
        ("--sha256 0", "sha256 must hold texts of 64 hexadecimal digits; one was '0'"),
        (f"--sha256 {zeros}", "must have the SHA-256 000"),
        ("--false-alarm-rate 0.5", "false_alarm_rate must be one"),
        (f"--api-key-file {tmp_path / 'key'}", "No such file"),
        (f"--api-key-file {os.devnull}", "api_key must not be empty"),
        # Of bytes that are no text.
        (f"--api-key-file {path}", "api_key must not be empty"),
        # A key in a file that Windows marks as UTF-8 is one.
        (f"--api-key-file {marked} --sha256 {zeros}", "must have the SHA-256 000"),
    ):
        assert cli.main(["serve", str(path), *arguments.split()]) == 2, arguments
        assert message in capsys.readouterr().err
