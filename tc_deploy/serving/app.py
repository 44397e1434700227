"""The server's routes: OpenAI's images API on loaded bundles, health, metrics, the page.

In: HTTP. Out: pictures, or an error that says what to do. Sizes and counts are refused before anything waits. Never:
runs an engine; each has a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tc_deploy import __version__
from tc_deploy.schedule import FULL
from tc_deploy.serving.engine import End, Engine, Event, Full, Order, State, Unavailable
from tc_deploy.serving.fleet import Fleet
from tc_deploy.serving.gate import HUNG_UP, Gate
from tc_deploy.serving.metrics import Metrics
from tc_deploy.serving.traces import traced
from tc_deploy.serving.wire import ApiError, Asked, ErrorBody, ImagesAnswer, ImagesBody, asked_of, encoded

LOOK_S = 0.2
"""How often a request that waits looks whether its client is still there."""
IMAGES = "/v1/images/generations"
PAGE = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "invalid; the message says what",
        401: "no key, or a wrong one",
        404: "no such model",
        413: "the body is too long",
        429: "the queue is full; come back after Retry-After seconds",
        500: "a defect here; the request id leads to the log",
        503: "loading, draining or failed",
        504: "not done before the deadline",
    }.items()
}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"
_WORDS = {
    End.LATE: (504, "not done before the server's deadline; ask for less, or later"),
    End.REFUSED: (400, "the picture came to values that are not finite; give another seed or guidance_scale"),
    End.FAILED: (500, "something went wrong here"),
    End.UNAVAILABLE: (503, "the engine failed; the server restarts"),
}


def app_of(
    fleet: Fleet,
    metrics: Metrics,
    *,
    timeout_s: float,
    watchdog_s: float,
    key: str | None = None,
    admin_key: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Gate:
    """The whole application.

    Args:
        fleet: the engines.
        metrics: counts.
        timeout_s: in which a request must be done.
        watchdog_s: how long an engine may take for one round.
        key: of clients.
        admin_key: of who may reload.
        clock: in seconds, that of the engines.
    """
    app = FastAPI(title="tc-deploy", version=__version__, docs_url=None, redoc_url=None)
    metrics.observe(fleet.engines)

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(error.body(_id(request)), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = place[0] if place and first["type"] != "json_invalid" else None
        words = "the body is no JSON" if first["type"] == "json_invalid" else str(first["msg"])
        message = f"{param}: {words}" if param else words
        return await _api_error(request, ApiError(400, message[:300], param=param and param[:100]))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        status = 400 if error.status_code == 422 else error.status_code
        return JSONResponse(ApiError(status, str(error.detail)).body(_id(request)), status, error.headers)

    @app.get("/livez", response_class=PlainTextResponse, responses={503: {"content": {"text/plain": {}}}})
    @app.get("/v2/health/live", response_class=PlainTextResponse, responses={503: {"content": {"text/plain": {}}}})
    async def live() -> Response:
        alive = fleet.is_alive(watchdog_s, clock())
        return PlainTextResponse("alive" if alive else "stuck", 200 if alive else 503)

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"content": {"text/plain": {}}}})
    @app.get("/v2/health/ready", response_class=PlainTextResponse, responses={503: {"content": {"text/plain": {}}}})
    async def ready() -> Response:
        return PlainTextResponse("ready" if fleet.is_ready else "not ready", 200 if fleet.is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(engine) for engine in fleet.engines.values()]}

    @app.post(IMAGES, response_model=ImagesAnswer, responses=_ERRORS)
    async def images(body: ImagesBody, request: Request) -> Response:
        start_s, engine = clock(), _engine(fleet, body.model)
        status = HUNG_UP
        try:
            if engine.state is not State.READY:
                raise _unavailable(engine.state)
            asked = asked_of(body, engine.maker.manifest, engine.maker.size, engine.most)
            events, order = _ordered(engine, asked, clock() + timeout_s)
            if asked.stream:
                stream = _streamed(engine, order, asked, events, _id(request))
                status = 200
                return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            try:
                answer = await _answered(engine, asked, events, request)
            finally:
                engine.cancel(order)  # nothing happens to one that has ended
            if answer is not None:
                status = 200
                metrics.request_seconds.labels(engine.name, asked.course).observe(clock() - start_s)
                metrics.pictures.labels(engine.name, asked.course).inc(asked.request.count)
                return JSONResponse(answer.model_dump())
            return Response(status_code=HUNG_UP)
        except ApiError as error:
            status = error.status
            raise
        finally:
            metrics.requests.labels(engine.name, str(status)).inc()

    @app.post("/admin/reload", include_in_schema=False)
    async def reload() -> Response:
        fleet.reload()
        return JSONResponse({"reloading": list(fleet.engines)}, 202)

    @app.get("/", include_in_schema=False)
    @app.get("/static/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE:
            raise HTTPException(404)
        content = files("tc_deploy.serving").joinpath("static", name).read_bytes()
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, media_type=PAGE[name], headers=headers)

    return Gate(app, key=key, admin_key=admin_key, clock=clock)


def _id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


def _engine(fleet: Fleet, model: str | None) -> Engine:
    if model is None and len(fleet.engines) == 1:
        return next(iter(fleet.engines.values()))
    if model is None:
        raise ApiError(400, f"several models are served, so name one: {', '.join(fleet.engines)}", param="model")
    if model not in fleet.engines:
        words = f"no such model; served are: {', '.join(fleet.engines)}"
        raise ApiError(404, words, param="model", code="model_not_found")
    return fleet.engines[model]


def _unavailable(state: State) -> ApiError:
    return ApiError(503, f"this model takes no requests now: {state.value}", code=state.value, retry_after_s=5)


def _described(engine: Engine) -> dict[str, Any]:
    """A bundle as OpenAI's clients list it, and what the page must know to draw it."""
    fields: dict[str, Any] = {"id": engine.name, "object": "model", "created": 0, "owned_by": "tc-deploy"}
    fields["state"] = engine.state.value
    if not engine.was_ready:
        return fields
    manifest, maker = engine.maker.manifest, engine.maker
    classes = next((item.classes for item in manifest.conditions if item.classes is not None), None)
    running, waiting = engine.samples
    return fields | {
        "bundle_id": maker.bundle_id,
        "size": f"{maker.size[1]}x{maker.size[0]}",
        "takes": "prompt" if manifest.text is not None else "class_label" if classes is not None else None,
        "classes": classes if manifest.text is None else None,
        "guidance_scale": manifest.solver.guidance_scale,
        "schedules": {name: list(course.variants) for name, course in maker.slots.courses.items()},
        "slots": maker.slots.count,
        "running": running,
        "waiting": waiting,
    }


def _ordered(engine: Engine, asked: Asked, deadline_s: float) -> tuple[asyncio.Queue[Event], Order]:
    """Put an order in; its events come into the queue."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    order = Order(
        request=asked.request,
        course=asked.course,
        deadline_s=deadline_s,
        tell=traced(tell, model=engine.name, quality=asked.course, count=asked.request.count),
        previews=asked.previews,
    )
    try:
        engine.submit(order)
    except Full:
        raise ApiError(429, "the queue is full", code="queue_full", retry_after_s=engine.retry_after_s) from None
    except Unavailable:
        raise _unavailable(engine.state) from None
    return events, order


async def _answered(
    engine: Engine, asked: Asked, events: asyncio.Queue[Event], request: Request
) -> ImagesAnswer | None:
    """Wait for all pictures; None where the client hung up.

    Raises:
        ApiError: it ended otherwise.
    """
    pictures: dict[int, Any] = {}
    while True:
        try:
            event = await asyncio.wait_for(events.get(), LOOK_S)
        except TimeoutError:
            if await request.is_disconnected():
                return None
            continue
        if event.end is not None and event.end is not End.DONE:
            raise _ended(event.end)
        if event.end is End.DONE:
            break
        if event.pixels is not None and event.is_last:
            pictures[event.picture] = event.pixels
    data = [
        {"b64_json": await asyncio.to_thread(encoded, pictures[number], asked.output_format)}
        for number in sorted(pictures)
    ]
    return ImagesAnswer.model_validate(_facts(engine, asked) | {"data": data})


def _ended(end: End) -> ApiError:
    status, words = _WORDS[end]
    return ApiError(status, words, code=end.value)


def _facts(engine: Engine, asked: Asked) -> dict[str, Any]:
    maker = engine.maker
    variants = maker.slots.courses[asked.course].variants
    return {
        "created": int(time.time()),
        "model": engine.name,
        "bundle_id": maker.bundle_id,
        "seed": asked.seed,
        "size": f"{maker.size[1]}x{maker.size[0]}",
        "quality": asked.course,
        "output_format": asked.output_format,
        "steps_full": variants.count(FULL),
        "steps_cached": len(variants) - variants.count(FULL),
    }


async def _streamed(
    engine: Engine, order: Order, asked: Asked, events: asyncio.Queue[Event], request_id: str
) -> AsyncIterator[bytes]:
    """The events of an order as they come; whoever stops listening cancels it."""
    try:
        yield _sent("image_generation.accepted", _facts(engine, asked))
        while True:
            event = await events.get()
            fields: dict[str, Any] = {"picture": event.picture, "step": event.step}
            if event.end is End.DONE:
                yield _sent("image_generation.done", _facts(engine, asked))
                return
            if event.end is not None:
                yield _sent("error", _ended(event.end).body(request_id))
                return
            if event.pixels is not None:
                fields["b64_json"] = await asyncio.to_thread(encoded, event.pixels, asked.output_format)
            kind = "step" if event.pixels is None else "completed" if event.is_last else "partial_image"
            yield _sent(f"image_generation.{kind}", fields)
    finally:
        engine.cancel(order)


def _sent(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
