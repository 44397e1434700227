"""From bundles to engines that are not started: what every process that serves them needs.

In: bundles by name, and settings. Out: what a :class:`Fleet` makes its engines with; the clients' keys. Never: starts
anything, or opens a socket.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tc_deploy.errors import UsageError
from tc_deploy.serving.engine import Engine
from tc_deploy.serving.fleet import MakeEngine
from tc_deploy.serving.maker import Maker
from tc_deploy.serving.metrics import Metrics
from tc_deploy.serving.scheduler import Policy

API_KEY, ADMIN_KEY = "TC_DEPLOY_API_KEY", "TC_DEPLOY_ADMIN_KEY"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Of every engine of a server."""

    slots: int
    """Pictures that are made at a time."""
    queue: int
    """Pictures that may wait for a slot."""
    policy: Policy = Policy.ALIGNED
    backend: str | None = None
    """Which of a bundle's targets; None takes the only one."""
    require_signature: Path | None = None


def makers_of(bundles: Mapping[str, Path], settings: EngineSettings, metrics: Metrics) -> dict[str, MakeEngine]:
    """What makes each bundle's engine, by the name that clients use."""
    return {name: _maker(name, path, settings, metrics) for name, path in bundles.items()}


def _maker(name: str, path: Path, settings: EngineSettings, metrics: Metrics) -> MakeEngine:
    load = functools.partial(
        Maker, path, settings.backend, slots=settings.slots, require_signature=settings.require_signature
    )
    return lambda failed: Engine(
        name, load, queue=settings.queue, policy=settings.policy, watch=metrics.watch(name), failed=failed
    )


def keys_from_environment() -> tuple[str | None, str | None]:
    """The key of clients, and that of who may reload; None where a variable is not set.

    Raises:
        UsageError: a key is no text of one line that a client could send.
    """
    keys = []
    for name in (API_KEY, ADMIN_KEY):
        value = os.environ.get(name)
        if value is not None and (not value.strip() or not value.isascii() or not value.isprintable()):
            raise UsageError(f"{name} must be printable ASCII; leave it unset for none")
        keys.append(value)
    return keys[0], keys[1]
