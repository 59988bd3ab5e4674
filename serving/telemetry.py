"""Telemetry: a request's id, its headers, its line in the log, its span and its counts.

Nothing here holds a prompt or an answer: a path is told by its route, a failure by its type.
"""

import logging
import time
import traceback
import uuid
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Tracer
from pythonjsonlogger.json import JsonFormatter
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.refusal import error_body
from serving.metrics import Metrics

log = logging.getLogger(__name__)

# The version of its API that OpenAI names in this header, and that we follow.
OPENAI_VERSION = "2020-10-01"
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass
class Visit:
    """One request as telemetry sees it; those who answer add to it.

    `headers` go out with the response; `facts` into log and span: release, tokens, key id, error.
    """

    request_id: str
    headers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str | int] = field(default_factory=dict)


def visit_of(scope: Scope) -> Visit:
    visit: Visit = scope["state"]["visit"]
    return visit


class Telemetry:
    """The outermost layer, pure ASGI: it sees every response, also that of a failure."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, organization: str, tracer: Tracer | None = None
    ) -> None:
        self._app, self._metrics, self._tracer = app, metrics, tracer
        self._fixed = {"openai-version": OPENAI_VERSION, "openai-organization": organization}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(f"req_{uuid.uuid4().hex}")
        scope.setdefault("state", {})["visit"] = visit
        began, status = time.perf_counter(), 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": self._headers(message, visit, began)}
            await send(message)

        with self._span(scope) as span:
            try:
                await self._app(scope, receive, stamped)
            except ClientDisconnect:
                visit.facts["error"] = "client left"
            except Exception as e:  # noqa: BLE001  whatever it is, its message may quote a prompt
                visit.facts["error"] = type(e).__name__
                told = {"request_id": visit.request_id}
                log.error("request failed: %s", _where(e), extra=told)  # noqa: TRY400
                if not status:
                    await _failed()(scope, receive, stamped)
            self._tell(scope, visit, status, time.perf_counter() - began, span)

    def _headers(self, message: Message, visit: Visit, began: float) -> list[tuple[bytes, bytes]]:
        ms = max(1, round((time.perf_counter() - began) * 1000))
        own = {"x-request-id": visit.request_id, "openai-processing-ms": str(ms)}
        headers = self._fixed | own | visit.headers
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        return [*message["headers"], *pairs]

    def _tell(
        self, scope: Scope, visit: Visit, status: int, seconds: float, span: Span | None
    ) -> None:
        route, method = _route(scope), scope["method"] if _route(scope) else "other"
        release = str(visit.facts.get("release", ""))
        # A client chooses the order of several: each would be a series of its own.
        label = "several" if "," in release else release
        self._metrics.requests.labels(method, route, str(status), label).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        ms = round(seconds * 1000, 1)
        facts = {"request_id": visit.request_id, "status": status, "ms": ms, **visit.facts}
        told = {"method": method, "route": route, **facts}
        log.info("%s %s %d in %.1f ms", method, route or "(no route)", status, ms, extra=told)
        if span is not None:
            span.update_name(f"{method} {route}")
            span.set_attribute("http.request.method", method)
            span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            for name, value in facts.items():
                span.set_attribute(f"instructloop.{name}", value)

    def _span(self, scope: Scope) -> AbstractContextManager[Span | None]:
        if self._tracer is None:
            return nullcontext()
        carrier = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        return self._tracer.start_as_current_span(
            "request", propagate.extract(carrier), SpanKind.SERVER, record_exception=False
        )


def tracer_to(endpoint: str) -> tuple[Tracer, TracerProvider] | None:
    """Spans in batches to an OTLP collector over HTTP; None without an endpoint."""
    if not endpoint:
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": "instructloop-serving"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider.get_tracer("instructloop"), provider


def configure_logging(form: Literal["text", "json"]) -> None:
    """The process's log on standard error: one line, or one JSON object, for each event."""
    handler = logging.StreamHandler()
    json_format = JsonFormatter(TEXT_FORMAT, rename_fields={"levelname": "level"})
    handler.setFormatter(json_format if form == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _failed() -> JSONResponse:
    message = "The server had an error while processing your request."
    return JSONResponse(error_body(500, message), 500)


def _where(error: Exception) -> str:
    """Type and places of an exception, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


def _route(scope: Scope) -> str:
    """The route's own path, `/v1/models/{model_id}`; empty where none matched."""
    route: Any = scope.get("route")
    return str(getattr(route, "path", ""))
