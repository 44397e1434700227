"""The process of a server: a socket, signals, an end in order.

SIGTERM and Ctrl-C: readiness goes first, so that no more clients are sent here; then nothing more is taken, and what
was accepted is answered; then the socket is closed. A second one ends at once. SIGHUP loads the bundles anew. In:
bundles and settings. Out: when it ends, the error that it ended with, if any. Never: decides what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tc_deploy.errors import BackendError, StorageError, first_line
from tc_deploy.serving.app import app_of
from tc_deploy.serving.engines import EngineSettings, keys_from_environment, makers_of
from tc_deploy.serving.fleet import Fleet
from tc_deploy.serving.gate import log_fields
from tc_deploy.serving.metrics import Metrics
from tc_deploy.serving.protocol import HeadInTime

LOG = logging.getLogger(__name__)
LOOK_S = 0.05
ANSWERS_S = 10
"""In which the last answers must have been sent, once their pictures are done."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a server."""

    host: str
    port: int
    engines: EngineSettings
    timeout_s: float
    """In which a request must be done."""
    watchdog_s: float
    """How long an engine may take for one round."""
    drain_delay_s: float
    """Between being unready and taking nothing more: as long as those who send clients take to notice."""


class JsonLines(logging.Formatter):
    """A line of the log as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        fields = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"), "level": record.levelname.lower()}
        fields |= {"event": record.getMessage(), **log_fields(record)}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def serve(bundles: Mapping[str, Path], settings: Settings) -> None:
    """Serve until a signal comes, or an engine fails.

    Args:
        bundles: by the name that clients use.
        settings: how.

    Raises:
        UsageError: the key is no text of one line.
        StorageError: the address is taken, or not this machine's.
        TcDeployError: a bundle cannot be loaded, or its engine failed.
        KeyboardInterrupt: it was ended by Ctrl-C, in order.
    """
    key, admin_key = keys_from_environment()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    ours = logging.getLogger("tc_deploy.serving")
    ours.handlers[:], ours.propagate = [handler], False
    asyncio.run(_Process(bundles, settings, key, admin_key).run())


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which closes the socket at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    """One run of the server."""

    def __init__(self, bundles: Mapping[str, Path], settings: Settings, key: str | None, admin_key: str | None) -> None:
        self._settings, self._metrics = settings, Metrics()
        self._error: BaseException | None = None
        self._interrupted = False
        self._ending: asyncio.Task[None] | None = None
        self._fleet = Fleet(makers_of(bundles, settings.engines, self._metrics), self._failed)
        app = app_of(
            self._fleet,
            self._metrics,
            timeout_s=settings.timeout_s,
            watchdog_s=settings.watchdog_s,
            key=key,
            admin_key=admin_key,
        )
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=HeadInTime,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=ANSWERS_S,
            lifespan="off",
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Serve; see :func:`serve`."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._fleet.reload)
        listener = self._socket()
        self._fleet.start()
        where = "http://{}:{}".format(*listener.getsockname()[:2])
        LOG.info("listening", extra={"url": where, "models": list(self._fleet.engines)})
        await self._server.serve(sockets=[listener])
        LOG.info("closed")
        if self._error is not None:
            raise self._error
        if self._interrupted:
            raise KeyboardInterrupt

    def _socket(self) -> socket.socket:
        settings = self._settings
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            raise StorageError(
                f"{settings.host}:{settings.port} cannot be listened at: {first_line(error)}; choose another --port"
            ) from error

    def _end(self, number: int) -> None:
        """A signal asks for an end; a second one for an end at once."""
        if self._ending is not None:
            self._server.force_exit = self._server.should_exit = True
            return
        self._interrupted = number == signal.SIGINT
        self._ending = self._loop.create_task(self._drained())

    def _failed(self, error: BaseException) -> None:
        """An engine failed, in its thread: there is nothing to serve with any more."""
        if not isinstance(error, Exception):
            error = BackendError(first_line(error))
        self._error = error

        def close() -> None:
            self._fleet.close_door()
            if self._ending is None:
                self._ending = self._loop.create_task(self._drained())

        self._loop.call_soon_threadsafe(close)

    async def _drained(self) -> None:
        """Close the door, wait for what was accepted, close the socket."""
        LOG.info("draining")
        self._fleet.close_door()
        if self._error is None:
            await asyncio.sleep(self._settings.drain_delay_s)
        self._fleet.drain()
        deadline_s = time.monotonic() + self._settings.timeout_s
        # Threads end it, which asyncio's events do not hear of.
        while not self._fleet.is_drained and self._error is None and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        self._server.should_exit = True
