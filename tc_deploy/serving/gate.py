"""What every request passes: an id, a limit to its body, the key, a line in the log, and an answer whatever happens.

Pure ASGI: middleware on top of Starlette's requests would hide it when a client hangs up. In: connections. Out: whole
bodies that are not too long, of clients that may ask. Never: looks into a body, or writes one to the log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_deploy.serving.wire import ApiError

LOG = logging.getLogger(__name__)
MOST_BODY_BYTES = 2**16
BODY_S = 10.0
"""In which a body must have come."""
GUARDED = "/v1/"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HUNG_UP = 499
"""In the log: the client left before there was an answer."""


class Gate:
    """See the module.

    Args:
        app: what is behind it.
        key: what clients must show; None lets everybody in.
        admin_key: what opens ``/admin/``; None keeps it closed.
        clock: in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        admin_key: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._key, self._admin_key, self._clock = app, key, admin_key, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a connection through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = self._clock()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = HUNG_UP

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, await _whole_body(headers, receive), answer)
        except ApiError as error:
            await _answer_error(error, request_id, answer)
        except Exception:
            LOG.exception("defect", extra={"request_id": request_id, "path": scope["path"]})
            if status == HUNG_UP:
                words = f"something went wrong here; the server's log has the reason under {request_id}"
                await _answer_error(ApiError(500, words), request_id, answer)
        finally:
            fields = {"method": scope["method"], "path": scope["path"], "status": status}
            seconds = round(self._clock() - start_s, 4)
            level = logging.DEBUG if not scope["path"].startswith(GUARDED) else logging.INFO
            LOG.log(level, "request", extra={"request_id": request_id, **fields, "seconds": seconds})

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        admin = path.startswith("/admin/")
        wanted = self._admin_key if admin else self._key
        if admin and wanted is None:
            raise ApiError(404, "no such route")
        if wanted is None or not (admin or path.startswith(GUARDED)):
            return
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        # In constant time: how long it takes says nothing about the key.
        if not hmac.compare_digest(shown.strip(), wanted.encode()) or scheme.lower() != b"bearer":
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


async def _whole_body(headers: dict[bytes, bytes], receive: Receive) -> Receive:
    """The body, read at once, in front of whatever else the client says."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > MOST_BODY_BYTES:
        raise _too_long()
    if not declared and b"transfer-encoding" not in headers:
        return receive
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    parts = [message]  # it hung up
                    break
                size += len(message.get("body", b""))
                if size > MOST_BODY_BYTES:
                    raise _too_long()
                parts.append(message)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(400, f"the body did not come within {BODY_S:g} s") from None
    waiting = iter(parts)

    async def replay() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replay


def _too_long() -> ApiError:
    return ApiError(413, f"a body has at most {MOST_BODY_BYTES} bytes here")


async def _answer_error(error: ApiError, request_id: str, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    body = json.dumps(error.body(request_id)).encode()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a log's line says beyond its message."""
    usual = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}
    return {name: value for name, value in record.__dict__.items() if name not in usual}
