"""OpenTelemetry spans of a request to /predict: one for the request, and below it one for each stage in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgrad.checks import extra

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider
    from starlette.requests import Request


class Trace:
    """The spans of one request while it lasts; without a tracer there are none.

    The request's span is below the one that the web framework has begun, or the caller's in ``traceparent`` (W3C).
    """

    def __init__(self, tracer: Tracer | None, request: Request) -> None:
        self._tracer, self._request = tracer, request
        #: HTTP status of the answer; 500 unless it is set.
        self.status = 500
        self._span: Any = None
        self._stage: Any = None

    def __enter__(self) -> Trace:
        if self._tracer is not None:
            from opentelemetry import propagate, trace

            below = trace.get_current_span().get_span_context().is_valid
            route: str = self._request.scope["route"].path
            self._span = self._tracer.start_span(
                f"POST {route}",
                context=None if below else propagate.extract(self._request.headers),
                kind=trace.SpanKind.INTERNAL if below else trace.SpanKind.SERVER,
                attributes={"http.request.method": "POST", "http.route": route},
            )
            self._context = trace.set_span_in_context(self._span)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        """End both spans; only a status from 500 on marks an error, because others are the caller's fault."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            if error is not None:
                self._span.record_exception(error)
            if self.status >= 500:
                self._span.set_status(StatusCode.ERROR)
            self._span.set_attribute("http.response.status_code", self.status)
            if self._stage is not None:
                self._stage.end()
            self._span.end()

    def stage(self, name: str, **attributes: int) -> None:
        """End the span of the stage before, and begin one for this stage."""
        if self._tracer is not None:
            if self._stage is not None:
                self._stage.end()
            self._stage = self._tracer.start_span(name, context=self._context, attributes=attributes)


def otlp_provider() -> TracerProvider:
    """Return a provider that sends spans over OTLP/HTTP as OpenTelemetry's own environment variables say."""
    with extra("traces"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import resources, trace
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # A service name in the environment takes precedence.
    resource = resources.Resource.create({resources.SERVICE_NAME: "fastgrad"})
    provider = trace.TracerProvider(resource=resource.merge(resources.OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
