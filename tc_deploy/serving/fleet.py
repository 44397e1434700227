"""Several bundles at once: their engines by name, loaded together, drained together, one replaced while it serves.

In: what makes an engine, by name. Out: engines that are ready, and word when one fails. Never: knows of HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from tc_deploy.errors import BackendError, OutOfMemoryError
from tc_deploy.serving.engine import Engine, State, reason_of

LOG = logging.getLogger(__name__)
MakeEngine = Callable[[Callable[[BaseException], None]], Engine]
"""Given whom to tell of a failure; the engine is not started."""


class Fleet:
    """See the module.

    Args:
        make: by the name that clients use.
        failed: told, in an engine's thread, of a failure that the process must end with.
    """

    def __init__(self, make: Mapping[str, MakeEngine], failed: Callable[[BaseException], None]) -> None:
        self._make, self._failed = make, failed
        self._lock = threading.Lock()
        self._draining = False
        self.engines: dict[str, Engine] = {}
        """Those that clients reach; one that could not be loaded for want of memory stays, failed."""
        self._leaving: list[Engine] = []
        """Those that have been replaced, while their last orders run."""

    def start(self) -> None:
        """Load all bundles, each in its thread."""
        for name in self._make:
            self.engines[name] = self._new(name)
        for engine in self.engines.values():
            engine.start()

    @property
    def is_ready(self) -> bool:
        """Whether all that could be loaded is, and takes orders."""
        states = [engine.state for engine in self.engines.values()]
        return not self._draining and State.LOADING not in states and State.READY in states

    @property
    def is_draining(self) -> bool:
        """Whether nothing is taken any more."""
        return self._draining

    def is_alive(self, limit_s: float, now_s: float) -> bool:
        """Whether every engine that was loaded goes round."""
        alive = [
            engine.is_alive(limit_s, now_s) for engine in self.engines.values() if engine.state is not State.FAILED
        ]
        return bool(alive) and all(alive)

    def close_door(self) -> None:
        """Be unready from now on; orders are still taken."""
        self._draining = True

    def drain(self) -> None:
        """Take no more orders; what was accepted goes on."""
        self._draining = True
        for engine in (*self.engines.values(), *self._leaving):
            engine.drain()

    @property
    def is_drained(self) -> bool:
        """Whether the last order of every engine has ended."""
        ended = (State.CLOSED, State.FAILED)
        return all(engine.state in ended for engine in (*self.engines.values(), *self._leaving))

    def reload(self) -> None:
        """Load every bundle anew beside the old one; switch when it is ready, and drain the old one.

        Where the new one cannot be loaded, the old one stays.
        """
        for name in self._make:
            threading.Thread(target=self._replace, args=(name,), name=f"reload {name}", daemon=True).start()

    def _replace(self, name: str) -> None:
        with self._lock:  # one at a time: each takes as much memory again
            new = self._new(name)
            new.start()
            new.settled.wait()
            if new.state is not State.READY or self._draining:
                new.drain()
                return
            old, self.engines[name] = self.engines[name], new
            self._leaving.append(old)
            old.drain()
            LOG.info("replaced", extra={"model": name})

    def _new(self, name: str) -> Engine:
        engine: Engine

        def failed(error: BaseException) -> None:
            LOG.error("engine failed", extra={"model": name, "reason": reason_of(error)})
            if self.engines.get(name) is not engine:
                return  # a new one that could not be loaded, or an old one whose last orders were lost
            was_loaded = engine.was_ready
            others = [other for other in self.engines.values() if other.state is not State.FAILED]
            # For want of memory others need not go; nothing else that keeps a bundle away is a reason to go on.
            if was_loaded or not others or not isinstance(error, OutOfMemoryError | BackendError):
                self._failed(error)

        engine = self._make[name](failed)
        return engine
