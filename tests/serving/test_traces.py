"""A request's spans, by OpenTelemetry's own SDK."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from bundles import MadeByCommands
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving.served import Served, wait_until


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """Set once for the process: OpenTelemetry takes no second."""
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture(scope="module")
def served(pixel: MadeByCommands) -> Iterator[Served]:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as served:
        yield served


@pytest.fixture
def spans(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    yield exporter
    exporter.shutdown()


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def test_a_request_waits_and_runs_in_spans_of_its_own(served: Served, spans: InMemorySpanExporter) -> None:
    assert served.ask(prompt="7", n=2, seed=424242, user="somebody").status_code == 200
    wait_until(lambda: named(spans, "queue") and named(spans, "steps"), "the spans")
    (queue,), (steps,) = named(spans, "queue"), named(spans, "steps")
    assert queue.start_time <= queue.end_time <= steps.start_time < steps.end_time
    assert [event.name for event in steps.events] == ["picture", "picture"]
    assert (steps.attributes["tc_deploy.end"], steps.attributes["tc_deploy.pictures"]) == ("done", 2)
    assert queue.context.trace_id == steps.context.trace_id
    assert queue.parent == steps.parent
    told = " ".join(span.to_json() for span in (queue, steps))
    assert "424242" not in told
    assert "somebody" not in told


def test_a_request_that_nobody_waits_for_says_so(served: Served, spans: InMemorySpanExporter) -> None:
    with served.held():
        with served.client() as client, pytest.raises(httpx.TimeoutException):
            client.post("/v1/images/generations", json={"prompt": "7"}, timeout=0.5)
        wait_until(lambda: served.engine._cancelled, "the cancellation")
    wait_until(lambda: [*named(spans, "queue"), *named(spans, "steps")], "the span")
    wait_until(lambda: served.engine.samples == (0, 0), "the end")
    ends = [span.attributes.get("tc_deploy.end") for span in spans.get_finished_spans() if span.attributes]
    assert "cancelled" in ends
