"""What a request to /predict tells OpenTelemetry: a span of its own and below it one for each stage, in turn.

Without a tracer provider nothing is imported and nothing told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgrad.checks import extra

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider


class Trace:
    """Of one request, while it lasts; this one tells nobody."""

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        """The request is over."""

    def stage(self, name: str, **attributes: int) -> None:
        """The stage before is over, this one begins."""

    def answered(self, status: int) -> None:
        """With this HTTP status."""


class SpanTrace(Trace):
    """Of one request, as spans.

    Args:
        tracer: makes them.
        route: path of the request, names of models as ``{name}``.
        headers: of the request; a caller's ``traceparent`` (W3C) makes it part of the caller's trace. Where the
            web framework has begun a span already, that one does.
    """

    def __init__(self, tracer: Tracer, route: str, headers: Mapping[str, str]) -> None:
        from opentelemetry import propagate, trace

        self._tracer = tracer
        self._stage: Span = trace.INVALID_SPAN
        below = trace.get_current_span().get_span_context().is_valid
        self._span = tracer.start_span(
            f"POST {route}",
            context=None if below else propagate.extract(headers),
            kind=trace.SpanKind.INTERNAL if below else trace.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": route},
        )
        self._context = trace.set_span_in_context(self._span)

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        """Both spans end."""
        self._stage.end()
        if error is not None:
            self._span.record_exception(error)
            self.answered(500)
        self._span.end()

    def stage(self, name: str, **attributes: int) -> None:
        """As in `Trace`."""
        self._stage.end()
        self._stage = self._tracer.start_span(name, context=self._context, attributes=attributes)

    def answered(self, status: int) -> None:
        """As in `Trace`; what the caller did wrong is no error of the server's."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)


class Traces:
    """Begins the trace of every request.

    Args:
        provider: of OpenTelemetry; None for none.
    """

    def __init__(self, provider: TracerProvider | None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("fastgrad.serve")

    def request(self, route: str, headers: Mapping[str, str]) -> Trace:
        """To be entered for as long as the request takes."""
        return Trace() if self._tracer is None else SpanTrace(self._tracer, route, headers)


def otlp_provider() -> TracerProvider:
    """Spans go out over OTLP/HTTP, where and how OpenTelemetry's own environment variables say.

    Raises:
        MissingExtraError: the extra ``traces`` is not installed.
    """
    with extra("traces"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import resources, trace
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What the environment says of the service goes before the name.
    resource = resources.Resource.create({resources.SERVICE_NAME: "fastgrad"})
    provider = trace.TracerProvider(resource=resource.merge(resources.OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
