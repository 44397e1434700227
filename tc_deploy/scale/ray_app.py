"""The server as an application of Ray Serve: in each replica the same routes, engines and scheduler.

    serve run tc_deploy.scale.ray_app:application bundles=/srv/engines/digits replicas=1 most_replicas=8

In: bundles that every machine finds at the same path, and settings. Out: an application. A replica takes as many
requests as its slots and its queue hold; what is more waits at the proxy, up to a bound, and is refused with 429 beyond
it. Replicas come and go with the number of requests that wait. A replica whose engine fails, or stands still, or cannot
make a picture, is replaced; whoever waited for it is answered with 500, and asks again. Never: imports Ray before an
application is made.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from tc_deploy.bundle import first_problem
from tc_deploy.errors import BackendError, UsageError, first_line
from tc_deploy.libraries import imported
from tc_deploy.scale.health import check_engine
from tc_deploy.serving.app import app_of
from tc_deploy.serving.engine import State
from tc_deploy.serving.engines import API_KEY, EngineSettings, keys_from_environment, makers_of
from tc_deploy.serving.fleet import Fleet
from tc_deploy.serving.metrics import Metrics

HEALTH_S = 10.0
"""How often Ray asks a replica for its health."""


class Arguments(BaseModel):
    """Of an application; from a command line all of them come as text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: list[Path]
    """One or more, with commas between them where they come as text."""
    slots: Annotated[int, Field(ge=1)] = 4
    queue: Annotated[int, Field(ge=0)] = 16
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    watchdog_s: Annotated[float, Field(ge=1)] = 120.0
    replicas: Annotated[int, Field(ge=1)] = 1
    """At least so many."""
    most_replicas: Annotated[int, Field(ge=1)] | None = None
    """At most so many; None: as many as there are at least."""
    gpus: Annotated[float, Field(ge=0)] = 0
    cpus: Annotated[float, Field(ge=0)] = 1
    """Of each replica."""
    backend: str | None = None

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Arguments:
        names = [path.name for path in self.bundles]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"bundles must be one or more folders of different names, found {names}")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"most_replicas must be at least replicas, {self.replicas}, found {self.most_replicas}")
        return self


class Replica:
    """One process of the application.

    Args:
        arguments: as JSON.
        has_key: whether clients need a key; where it is not set here too, everybody would be let in.

    Raises:
        TcDeployError: a bundle cannot be loaded, or the key is missing.
    """

    def __init__(self, arguments: str, has_key: bool) -> None:
        self._arguments = settings = Arguments.model_validate_json(arguments)
        key, admin_key = keys_from_environment()
        if has_key and key is None:
            raise UsageError(f"{API_KEY} is set where the application was made and not here; set it on every machine")
        self._error: BaseException | None = None
        metrics = Metrics()
        engines = EngineSettings(slots=settings.slots, queue=settings.queue, backend=settings.backend)
        self._fleet = Fleet(makers_of({path.name: path for path in settings.bundles}, engines, metrics), self._failed)
        self._fleet.start()
        for engine in self._fleet.engines.values():
            engine.settled.wait()
            if engine.state is State.FAILED:
                engine.thread.join()  # whose last act is to say why
        self._check()
        self.gate = app_of(
            self._fleet,
            metrics,
            timeout_s=settings.timeout_s,
            watchdog_s=settings.watchdog_s,
            key=key,
            admin_key=admin_key,
        )

    async def check_health(self) -> None:
        """Called by Ray; a replica of which it raises is replaced.

        Raises:
            BackendError: an engine failed, stands still, or makes no picture.
        """
        self._check()
        if not self._fleet.is_alive(self._arguments.watchdog_s, time.monotonic()):
            raise BackendError("an engine stands still")
        for engine in list(self._fleet.engines.values()):
            await asyncio.to_thread(check_engine, engine, self._arguments.watchdog_s)

    def _check(self) -> None:
        if self._error is not None:
            raise BackendError(f"an engine failed: {first_line(self._error)}") from self._error

    def _failed(self, error: BaseException) -> None:
        self._error = error
        self._fleet.close_door()

    def __del__(self) -> None:
        if fleet := getattr(self, "_fleet", None):
            fleet.drain()


def _asgi() -> ASGIApp:
    """What Ray's wrapper of a replica calls for each request: the replica's own application."""
    from starlette.applications import Starlette

    context: Any = imported("ray.serve").get_replica_context
    lifespan = Starlette()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answers = lifespan if scope["type"] == "lifespan" else context().servable_object.gate
        await answers(scope, receive, send)

    return app


def application(arguments: Mapping[str, Any]) -> Any:
    """Make the application; ``serve run`` and a configuration file name this function.

    Args:
        arguments: fields of :class:`Arguments`.

    Raises:
        BackendError: Ray is not installed.
        UsageError: an argument is none, or a key is no text that a client could send.
    """
    try:
        given = Arguments.model_validate(arguments)
    except ValidationError as error:
        where, reason = first_problem(error)
        raise UsageError(f"{where}: {reason}" if where else reason) from None
    serve: Any = imported("ray.serve", purpose="replicas are its actors: ")
    bundles = [Path(os.path.abspath(path)) for path in given.bundles]  # noqa: PTH100 - a link may lead elsewhere there
    settings = given.model_copy(update={"bundles": bundles})
    places = settings.slots + settings.queue
    deployment = serve.deployment(
        serve.ingress(_asgi)(Replica),
        name="tc-deploy",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=places,
        max_queued_requests=places,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": settings.replicas,
            "max_replicas": settings.most_replicas or settings.replicas,
            "target_ongoing_requests": settings.slots,
        },
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=settings.watchdog_s + HEALTH_S,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=settings.timeout_s,
    )
    return deployment.bind(settings.model_dump_json(), keys_from_environment()[0] is not None)
