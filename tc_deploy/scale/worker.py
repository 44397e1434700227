"""One engine that does rows, many at a time: the server's loop and scheduler, without a socket.

In: rows. Out: what became of each, in the order of their ends. What fails because of one row ends that row alone; what
fails in the device ends the run. Never: reads or writes a file but the bundle's.
"""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tc_deploy.scale.rows import Made, Row, asked_of_row
from tc_deploy.serving.engine import End, Engine, Event, Order, State
from tc_deploy.serving.maker import Maker
from tc_deploy.serving.wire import MOST_PICTURES, ApiError, Asked, encoded

AHEAD = 4
"""Pictures under way for every slot, so that each tick finds somebody for its call."""
_NOT_FINITE = "the picture came to values that are not finite; give another seed or guidance_scale"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What every worker is made of."""

    path: Path
    """``engines/NAME``, where each machine finds it."""
    backend: str | None
    """Which of its targets; None takes the only one."""
    slots: int
    """Pictures that are made at a time."""
    require_signature: Path | None
    """A public key in PEM, whose holder must have signed the bundle."""


@dataclass(kw_only=True, eq=False)
class _Open:
    """A row that is under way."""

    row: Row
    asked: Asked
    pictures: dict[int, str] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.asked.request.count - len(self.pictures)


class RowMaker:
    """See the module; a context manager.

    Args:
        settings: of the engine.

    Raises:
        TcDeployError: the bundle cannot be loaded; as of :class:`Maker`.
    """

    def __init__(self, settings: Workers) -> None:
        self._failure: BaseException | None = None
        self._most = AHEAD * settings.slots
        load = functools.partial(
            Maker,
            settings.path,
            settings.backend,
            slots=settings.slots,
            require_signature=settings.require_signature,
        )
        self._engine = Engine(settings.path.name, load, queue=self._most + MOST_PICTURES, failed=self._failed)
        self._engine.start()
        self._engine.settled.wait()
        self._engine_runs()

    def made(self, rows: Iterable[Row]) -> Iterator[Made]:
        """Do rows; so many are under way as keep the engine busy.

        Raises:
            TcDeployError: the engine failed.
        """
        events: queue.SimpleQueue[tuple[_Open, Event]] = queue.SimpleQueue()
        open_rows: dict[int, _Open] = {}
        waiting = iter(rows)
        row = next(waiting, None)
        while row is not None or open_rows:
            if row is not None and sum(each.left for each in open_rows.values()) < self._most:
                try:
                    open_rows[row.line] = self._start(row, events)
                except ApiError as error:
                    yield Made(line=row.line, error=error.message)
                row = next(waiting, None)
                continue
            one, event = events.get()
            if event.is_last:
                assert event.pixels is not None, "a picture that is done is shown"
                one.pictures[event.picture] = encoded(event.pixels, one.asked.output_format)
            if event.end is None:
                continue
            self._engine_runs()
            del open_rows[one.row.line]
            if event.end is End.DONE:
                yield Made(line=one.row.line, pictures=tuple(one.pictures[key] for key in sorted(one.pictures)))
            else:
                yield Made(line=one.row.line, error=_NOT_FINITE)

    def _start(self, row: Row, events: queue.SimpleQueue[tuple[_Open, Event]]) -> _Open:
        """Put a row in; its events come into the queue.

        Raises:
            ApiError: it does not fit the bundle.
        """
        maker = self._engine.maker
        one = _Open(row=row, asked=asked_of_row(row, maker.manifest, maker.size))
        self._engine.submit(
            Order(
                request=one.asked.request,
                course=one.asked.course,
                deadline_s=math.inf,
                tell=lambda event: events.put((one, event)),
            )
        )
        return one

    def _engine_runs(self) -> None:
        """Look whether the engine has failed, and raise what it failed with."""
        if self._engine.state is not State.FAILED:
            return
        self._engine.thread.join()  # whose last act is to say why
        assert self._failure is not None, "it has said why"
        raise self._failure

    def _failed(self, error: BaseException) -> None:
        self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._engine.drain()
        if kind is None:  # who is interrupted does not wait for what is under way
            self._engine.thread.join()
