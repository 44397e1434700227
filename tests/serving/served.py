"""A server in this process, on a socket of its own, whose engine a test can hold still."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import uvicorn

from tc_deploy.serving.app import app_of
from tc_deploy.serving.engine import Engine, State
from tc_deploy.serving.fleet import Fleet
from tc_deploy.serving.maker import Maker
from tc_deploy.serving.metrics import Metrics
from tc_deploy.serving.protocol import HeadInTime

PATIENT_S = 60.0


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENT_S) -> None:
    """Wait for what another thread does."""
    end_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} never came"
        time.sleep(0.005)


class Served:
    """A running server, and what a test looks into."""

    def __init__(self, bundles: dict[str, Path], *, slots: int, queue: int, **options: Any) -> None:
        self.failures: list[BaseException] = []
        self.metrics = Metrics()
        make = {
            name: functools.partial(self._engine, name, functools.partial(Maker, path, None, slots=slots), queue)
            for name, path in bundles.items()
        }
        self.fleet = Fleet(make, self.failures.append)
        settings = {"timeout_s": PATIENT_S, "watchdog_s": PATIENT_S, **options}
        self.app = app_of(self.fleet, self.metrics, **settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, http=HeadInTime, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def _engine(self, name: str, load: Callable[[], Maker], queue: int, failed: Callable[..., None]) -> Engine:
        return Engine(name, load, queue=queue, watch=self.metrics.watch(name), failed=failed)

    @property
    def engine(self) -> Engine:
        """The first bundle's."""
        return next(iter(self.fleet.engines.values()))

    def client(self, **options: Any) -> httpx.Client:
        """A client of it."""
        return httpx.Client(base_url=self.url, timeout=PATIENT_S, **options)

    def ask(self, **body: Any) -> httpx.Response:
        """Post a request for pictures."""
        with self.client() as client:
            return client.post("/v1/images/generations", json=body)

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """The engine stands still before its next tick until the event is set, or the block is left."""
        slots, go = self.engine.maker.slots, threading.Event()
        run = slots.run

        def wait_and_run(tick: Any) -> None:
            assert go.wait(PATIENT_S)
            run(tick)

        slots.run = wait_and_run  # type: ignore[method-assign]
        try:
            yield go
        finally:
            go.set()
            slots.run = run  # type: ignore[method-assign]
            wait_until(
                lambda: self.engine.samples == (0, 0) or self.engine.state is State.FAILED, "the end of all orders"
            )

    def __enter__(self) -> Self:
        self.fleet.start()
        self._thread.start()
        for engine in self.fleet.engines.values():
            assert engine.settled.wait(PATIENT_S)
        wait_until(lambda: self._server.started, "the socket")
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.drain()
        self._server.should_exit = True
        self._thread.join(PATIENT_S)
        for engine in self.fleet.engines.values():
            engine.thread.join(PATIENT_S)
