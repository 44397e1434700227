"""When a replica calls itself unhealthy: without Ray, which only asks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MadeByCommands
from serving.served import PATIENT_S, Served, wait_until

from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.scale.health import check_engine
from tc_deploy.scale.ray_app import Arguments, Replica, application


@pytest.fixture
def replica(pixel: MadeByCommands, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(has_key: bool = False, **changes: Any) -> Replica:
        arguments = Arguments.model_validate({"bundles": [pixel.bundle], "slots": 2, **changes})
        made.append(Replica(arguments.model_dump_json(), has_key))
        return made[-1]

    yield make
    for each in made:
        each.__del__()
        for engine in each._fleet.engines.values():
            engine.thread.join(PATIENT_S)


def test_an_engine_that_makes_pictures_is_healthy_and_one_that_stands_still_is_not(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server:
        check_engine(server.engine, PATIENT_S)
        with server.held(), pytest.raises(BackendError, match=r"made no picture within 0\.2 s"):
            check_engine(server.engine, 0.2)
        check_engine(server.engine, PATIENT_S)


def test_who_is_busy_is_not_asked_for_a_picture(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server, server.held() as go:
        asking = threading.Thread(target=server.ask, kwargs={"prompt": "7", "seed": 0})
        asking.start()
        wait_until(lambda: server.engine.samples == (1, 0), "the request")
        start_s = time.monotonic()
        check_engine(server.engine, PATIENT_S)
        assert time.monotonic() - start_s < PATIENT_S / 2
        go.set()
        asking.join(PATIENT_S)


def test_an_engine_that_computes_nonsense_is_unhealthy(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server:
        slots = server.engine.maker.slots
        slots.latents = lambda number, step: np.full((3, 8, 8), np.nan, np.float32)  # type: ignore[method-assign]
        with pytest.raises(BackendError, match=r"ended as refused"):
            check_engine(server.engine, PATIENT_S)


def test_a_replica_whose_engine_fails_says_so_when_it_is_asked(replica: Callable[..., Replica]) -> None:
    one = replica()
    asyncio.run(one.check_health())
    (engine,) = one._fleet.engines.values()

    def fail(tick: Any) -> None:
        raise BackendError("the device is gone")

    engine.maker.slots.run = fail  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"ended as unavailable|the device is gone"):
        asyncio.run(one.check_health())
    engine.thread.join(PATIENT_S)
    with pytest.raises(BackendError, match="the device is gone"):
        asyncio.run(one.check_health())


def test_a_replica_without_the_key_lets_nobody_in(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TC_DEPLOY_API_KEY", raising=False)
    with pytest.raises(UsageError, match="set it on every machine"):
        replica(has_key=True)
    monkeypatch.setenv("TC_DEPLOY_API_KEY", "secret")
    replica(has_key=True)


def test_a_replica_without_its_bundle_does_not_start(replica: Callable[..., Replica], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"an engine failed: .*nothing") as raised:
        replica(bundles=[tmp_path / "nothing"])
    assert isinstance(raised.value.__cause__, BundleError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "bundles"),
        ({"bundles": "a/x,b/x"}, "different names"),
        ({"bundles": "x", "replicas": "2", "most_replicas": "1"}, "most_replicas must be at least replicas"),
        ({"bundles": "x", "slots": "0"}, "slots"),
        ({"bundles": "x", "colour": "red"}, "colour"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        application(arguments)
