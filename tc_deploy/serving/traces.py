"""A request as spans of OpenTelemetry: how long it waited for a slot, and how long its steps took.

In: what whoever ordered is told. Out: two spans, ``queue`` and ``steps``, below the span that FastAPI makes of the HTTP
request; nothing where no tracer has been set up. Never: names a prompt, a seed or a client.
"""

from __future__ import annotations

from collections.abc import Callable

from tc_deploy.serving.engine import End, Event

try:
    from opentelemetry import context, trace
except ModuleNotFoundError:  # FastAPI brings it only of late
    trace = None  # type: ignore[assignment]


def traced(tell: Callable[[Event], None], *, model: str, quality: str, count: int) -> Callable[[Event], None]:
    """What is told of an order, told to a trace too.

    Args:
        tell: is told every event.
        model: what clients call the bundle.
        quality: the course that the pictures take.
        count: pictures.

    Returns:
        To be told in the place of ``tell``, from any thread; the first span begins now.
    """
    if trace is None:
        return tell
    tracer, within = trace.get_tracer("tc_deploy.serving"), context.get_current()
    attributes: dict[str, str | int] = {
        "tc_deploy.model": model,
        "tc_deploy.quality": quality,
        "tc_deploy.pictures": count,
    }
    span, running = tracer.start_span("queue", within, attributes=attributes), False

    def told(event: Event) -> None:
        nonlocal span, running
        if event.step and not running:
            span.end()
            span, running = tracer.start_span("steps", within, attributes=attributes), True
        if event.is_last:
            span.add_event("picture", {"tc_deploy.picture": event.picture})
        if event.end is not None:
            span.set_attribute("tc_deploy.end", event.end.value)
            if event.end is not End.DONE:
                span.set_status(trace.StatusCode.ERROR)
            span.end()
        tell(event)

    return told
