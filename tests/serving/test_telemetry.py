import asyncio
import json
import logging
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pythonjsonlogger.json import JsonFormatter

from contracts.events import Stamper
from contracts.release import ReleaseRegistry
from serving.gate import Gate
from serving.limits import Limiter, LimitOptions
from serving.metrics import Metrics
from serving.recorder import Recorder
from serving.swap import SwapOptions, WeightSwapper
from serving.telemetry import Telemetry, visit_of
from tests.fakes import FakeEngine, MemorySink

SECRET = "a secret question"


def metrics(root: Any) -> Metrics:
    sink, stamper = MemorySink(), Stamper("test")
    registry = ReleaseRegistry(root)
    swapper = WeightSwapper(FakeEngine(), registry, Gate(), sink, stamper, SwapOptions())
    return Metrics(swapper, Recorder(sink, stamper), Limiter(LimitOptions(), "test"))


def ask(app: Telemetry, path: str) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": SECRET.encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent


async def answers(scope: Any, receive: Any, send: Any) -> None:
    visit_of(scope).headers["x-policy-release"] = "r1"
    visit_of(scope).facts["release"] = "r1"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": SECRET.encode()})


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError(SECRET)


def test_line_and_span_say_what_happened_and_no_text(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = Telemetry(answers, metrics(tmp_path), "org", provider.get_tracer("test"))
    with caplog.at_level(logging.INFO, "serving.telemetry"):
        sent = ask(app, f"/v1/models/{SECRET}")
    headers = dict(sent[0]["headers"])
    assert headers[b"x-policy-release"] == b"r1" and headers[b"openai-organization"] == b"org"
    line = json.loads(JsonFormatter("%(message)s").format(caplog.records[-1]))
    assert line["release"] == "r1" and line["status"] == 200
    assert line["request_id"].encode() == headers[b"x-request-id"]
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None and span.attributes["instructloop.release"] == "r1"
    assert SECRET not in caplog.text + json.dumps(line) + span.to_json()


def test_a_fault_is_told_by_its_type_and_answered_in_openais_shape(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    counted = metrics(tmp_path)
    sent = ask(Telemetry(fails, counted, "org"), "/v1/x")
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"
    assert "RuntimeError at fails" in caplog.text
    assert SECRET not in caplog.text + repr(sent)
    assert 'instructloop_requests_total{method="other",release="",route="",status="500"} 1.0' in (
        counted.text().decode()
    )
