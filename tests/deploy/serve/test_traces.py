"""The spans of requests: which, in whose trace, and that there are none unless asked for."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from python_process import run_python
from serve_client import acall, image, running
from serve_stub import PNG, make, the_one

from fastgrad.deploy.serve.child import ChildDiedError

STAGES = ["read", "decode", "queue", "run", "answer"]


def traced(package: Path, **options: Any) -> tuple[Any, InMemorySpanExporter]:
    provider, found = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    app = make(package, tracer_provider=provider, **options)
    answers = the_one(app).pool.submit

    async def submit(parts: Any, on_run: Any) -> Any:
        on_run(3)
        return await answers(parts, on_run)

    the_one(app).pool.submit = submit
    return app, found


def request(app: Any, headers: dict[str, str] = PNG, body: bytes = image()) -> int:
    return asyncio.run(acall(app, "POST", "/predict", headers, [body]))[0]


def spans(found: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """That of the request, and those of its stages."""
    *stages, whole = sorted(found.get_finished_spans(), key=lambda span: (span.parent is None, span.start_time))
    assert all(stage.parent is not None and stage.parent.span_id == whole.context.span_id for stage in stages)
    return whole, stages


def test_a_request_and_its_stages_one_after_another(tiny_package: Path) -> None:
    app, found = traced(tiny_package, delay=0.05)
    assert request(app) == 200
    whole, stages = spans(found)
    assert (whole.name, whole.kind) == ("POST /predict", SpanKind.SERVER)
    expected = {"http.request.method": "POST", "http.route": "/predict", "http.response.status_code": 200}
    assert dict(whole.attributes) == expected
    assert [stage.name for stage in stages] == STAGES
    assert dict(stages[3].attributes) == {"batch_size": 3}
    assert stages[3].end_time - stages[3].start_time >= 0.04e9
    for before, after in itertools.pairwise(stages):
        assert whole.start_time <= before.end_time <= after.start_time <= whole.end_time


def test_the_trace_of_the_caller_goes_on(tiny_package: Path) -> None:
    app, found = traced(tiny_package)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    assert request(app, {**PNG, "traceparent": f"00-{trace}-{parent}-01"}) == 200
    ended = found.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in ended} == {trace}
    assert f"{ended[-1].parent.span_id:016x}" == parent


def test_refusals_and_failures(tiny_package: Path) -> None:
    app, found = traced(tiny_package)
    assert request(app, body=b"no image") == 400
    whole, stages = spans(found)
    assert [stage.name for stage in stages] == STAGES[:2]
    assert (whole.attributes["http.response.status_code"], whole.status.status_code) == (400, StatusCode.UNSET)
    answered, raised = contextlib.nullcontext(), pytest.raises(RuntimeError, match="unforeseen")
    for error, outcome, events in (
        (ChildDiedError("it failed"), answered, []),
        (RuntimeError("unforeseen"), raised, ["exception"]),
    ):
        app, found = traced(tiny_package, error=error)
        with outcome:
            assert request(app) == 500
        whole, stages = spans(found)
        assert [stage.name for stage in stages] == STAGES[:4]
        assert [event.name for event in whole.events] == events
        assert (whole.attributes["http.response.status_code"], whole.status.status_code) == (500, StatusCode.ERROR)


def test_spans_arrive_at_a_collector(tiny_package: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=proof",
        }
        with running(tiny_package, "--traces", env=environment) as server:
            assert server.predict(image(), "image/png")[0] == 200
        collector.shutdown()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = b"".join(body for _, body in received)
    for word in (b"POST /predict", b"fastgrad", b"proof", *(stage.encode() for stage in STAGES)):
        assert word in sent, word


def test_below_the_span_of_a_framework(tiny_package: Path) -> None:
    app, found = traced(tiny_package)
    tracer = TracerProvider().get_tracer("framework")
    with tracer.start_as_current_span("above") as above:
        assert request(app, {**PNG, "traceparent": f"00-{1:032x}-{1:016x}-01"}) == 200
    own = found.get_finished_spans()[-1]
    assert (own.parent.span_id, own.kind) == (above.get_span_context().span_id, SpanKind.INTERNAL)


def test_nothing_is_imported_without_traces(tiny_package: Path) -> None:
    # Newer versions of FastAPI import parts of OpenTelemetry themselves.
    code = """
import sys, fastapi
def found():
    return {name for name in sys.modules if name.startswith("opentelemetry")}
before = found()
from fastgrad.deploy.serve.app import create_app
create_app(sys.argv[1])
print(found() - before)
"""
    assert run_python("-c", code, tiny_package).strip() == "set()"
