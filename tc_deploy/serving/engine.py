"""The loop that runs a bundle's engines, in the one thread that touches them.

In: orders, from any thread. Out: events, told to whoever ordered, in the engine's thread. The thread loads the bundle,
tests it, and then goes round: what was ordered and cancelled meanwhile, whose time is up, who gets a slot, one tick,
who is done. What fails because of one order ends that order alone. What fails in the device ends all of them, and the
engine: nothing it computes can be trusted after that. Never: knows of HTTP, or decides what runs.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import NotFiniteError, TcDeployError, UsageError
from tc_deploy.runtime.course import Tick
from tc_deploy.runtime.request import Request
from tc_deploy.schedule import FULL
from tc_deploy.serving.maker import Maker
from tc_deploy.serving.scheduler import Job, Policy, Scheduler

LOG = logging.getLogger(__name__)
PATIENCE_FULL_STEPS = 8
"""The bound on waiting, in full steps of one sample: so long a sample may be passed over."""
LATEST_TICKS = 256
"""What is remembered to tell how long a request will wait."""


class State(enum.StrEnum):
    """Of an engine."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


class End(enum.StrEnum):
    """How an order ends."""

    DONE = "done"
    CANCELLED = "cancelled"
    LATE = "late"
    REFUSED = "refused"
    """By what it asks for; found out only when it ran."""
    FAILED = "failed"
    """By us."""
    UNAVAILABLE = "unavailable"
    """The engine failed meanwhile."""


class Full(Exception):  # noqa: N818 - an answer, not a failure
    """The queue has no room for an order."""


class Unavailable(Exception):  # noqa: N818 - as Full
    """The engine is loading, draining, closed or failed."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What whoever ordered is told."""

    end: End | None = None
    """None where it goes on."""
    picture: int = 0
    """Which of the order's."""
    step: int = 0
    """How many steps that picture has taken."""
    pixels: NDArray[np.uint8] | None = None
    """The picture as it stands, (H, W) or (H, W, 3); None where nobody asked for it at this step."""
    is_last: bool = False
    """Whether that picture is done."""


@dataclass(kw_only=True, eq=False)
class Order:
    """A request that somebody waits for."""

    request: Request
    course: str
    deadline_s: float
    """On the monotonic clock."""
    tell: Callable[[Event], None]
    """Called in the engine's thread; must not block."""
    previews: int = 0
    """How many times each picture is shown before it is done."""
    arrived_s: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    left: int = 0
    """Pictures that are not done."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is told of the loop, for metrics; called in the engine's thread."""

    tick: Callable[[Tick, float, int], None] = lambda tick, seconds, size: None
    """A tick, its seconds, and how many slots the call had."""


class Engine:
    """One bundle's engines and their thread.

    Args:
        name: what clients call the bundle.
        load: makes the maker; called in the thread.
        queue: samples that may wait for a slot.
        policy: who gets a slot.
        watch: told of every tick.
        failed: called in the thread when the engine fails for good, with the reason.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Maker],
        *,
        queue: int,
        policy: Policy = Policy.ALIGNED,
        watch: Watch | None = None,
        failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.name, self._load, self._queue, self._policy = name, load, queue, policy
        self._watch, self._failed = watch or Watch(), failed
        self.state = State.LOADING
        self.was_ready = False
        self.settled = threading.Event()
        """Set when it has been loaded, or could not be."""
        self.maker: Maker
        self._scheduler: Scheduler
        self._changed = threading.Condition()
        self._orders: collections.deque[Order] = collections.deque()
        self._cancelled: collections.deque[Order] = collections.deque()
        self._open: dict[Order, None] = {}
        """Every order that has not ended."""
        self.beat_s = time.monotonic()
        """When the loop last came round."""
        self._seconds: collections.deque[float] = collections.deque(maxlen=LATEST_TICKS)
        self.thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the bundle."""
        self.thread.start()

    # ------------------------------------------------------------------------------------------------ from any thread

    @property
    def samples(self) -> tuple[int, int]:
        """Those that run, and those that wait."""
        if self.state in (State.LOADING, State.FAILED):
            return 0, 0
        running = len(self._scheduler.running)
        return running, max(sum(order.left for order in list(self._open)) - running, 0)

    @property
    def most(self) -> int:
        """Pictures that one order can have."""
        return self.maker.slots.count + self._queue

    @property
    def retry_after_s(self) -> int:
        """When there may be room again: what an average sample takes."""
        if self.state is not State.READY or not self._seconds:
            return 1
        course = next(iter(self.maker.slots.courses.values()))
        return max(1, round(sum(self._seconds) / len(self._seconds) * course.steps))

    def is_alive(self, limit_s: float, now_s: float) -> bool:
        """Whether the loop came round lately; while it loads, only whether the thread lives."""
        if self.state is State.FAILED or not self.thread.is_alive():
            return self.state is State.CLOSED
        busy = self.state is not State.LOADING and bool(self._open)
        return not busy or now_s - self.beat_s < limit_s

    def submit(self, order: Order) -> None:
        """Take an order; what becomes of it, its ``tell`` is told.

        Raises:
            Full: no room for all its pictures.
            Unavailable: the engine takes none.
        """
        with self._changed:
            if self.state is not State.READY:
                raise Unavailable(self.state)
            if sum(one.left for one in self._open) + order.request.count > self.most:
                raise Full
            order.arrived_s, order.left = time.monotonic(), order.request.count
            self._open[order] = None
            self._orders.append(order)
            self._changed.notify()

    def cancel(self, order: Order) -> None:
        """Nobody waits for an order any more; it ends before its next step."""
        with self._changed:
            self._cancelled.append(order)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more orders, and end when the last is done."""
        with self._changed:
            if self.state is State.READY:
                self.state = State.DRAINING
            self._changed.notify()

    # ------------------------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            self.maker = self._load()
            call_s = self.maker.warm_up()
            slots = self.maker.slots
            self._scheduler = Scheduler(
                slots=slots.count,
                sizes=slots.sizes,
                call_s=call_s,
                queue=self._queue,
                patience_s=PATIENCE_FULL_STEPS * call_s[FULL, slots.sizes[0]],
                policy=self._policy,
            )
            self.state, self.was_ready = State.READY, True
            self.settled.set()
            LOG.info("ready", extra={"model": self.name, "calls": {f"{v}x{n}": s for (v, n), s in call_s.items()}})
            while self._wait():
                self._round()
            self.state = State.CLOSED
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must be told
            with self._changed:
                self.state = State.FAILED
            self.settled.set()
            for order in list(self._open):
                self._end(order, End.UNAVAILABLE)
            self._failed(error)

    def _wait(self) -> bool:
        """Wait until there is something to do; False when there will be nothing any more."""
        with self._changed:
            while not (self._orders or self._cancelled or self._open):
                if self.state is State.DRAINING:
                    return False
                self._changed.wait()
        return True

    def _round(self) -> None:
        self.beat_s = time.monotonic()
        while self._cancelled:
            self._end(self._cancelled.popleft(), End.CANCELLED)
        while self._orders:
            self._enter(self._orders.popleft())
        scheduler, slots = self._scheduler, self.maker.slots
        for job in scheduler.expire(time.monotonic()):
            self._end(job.what[0], End.LATE)
        for job in scheduler.admit(time.monotonic()):
            assert job.slot is not None, "it was admitted"
            slots.start(job.slot, job.what[2])
        start_s = time.monotonic()
        tick = scheduler.tick(start_s)
        if tick is None:
            return
        slots.run(tick)
        seconds = time.monotonic() - start_s
        self._seconds.append(seconds)
        # Before anybody is answered, so that who has an answer finds it counted.
        self._watch.tick(tick, seconds, tick.size)
        going = {job.slot: job for job in scheduler.running}
        finished = scheduler.done(tick, time.monotonic())
        for place in tick.places:
            job = going[place.slot]
            if job.what[0] not in self._open:
                continue  # another picture of the same order has failed
            if job in finished:
                self._finish(job)
            else:
                self._show(job, place.step)

    def _enter(self, order: Order) -> None:
        if order not in self._open:
            return  # cancelled before it was looked at
        try:
            samples = self.maker.samples(order.request, order.course)
        except (UsageError, NotFiniteError):
            self._end(order, End.REFUSED)
            return
        order.jobs = [
            Job(
                course=sample.course,
                arrived_s=order.arrived_s,
                deadline_s=order.deadline_s,
                what=(order, number, sample),
            )
            for number, sample in enumerate(samples)
        ]
        entered = self._scheduler.submit(order.jobs)
        assert entered, "an order was taken only where there was room"

    def _show(self, job: Job, before: int) -> None:
        """Tell of a step, and show the picture where it is time for that."""
        order, number, _ = job.what
        steps, pixels = job.course.steps, None
        if job.step * (order.previews + 1) // steps > before * (order.previews + 1) // steps:
            assert job.slot is not None, "it runs"
            with contextlib.suppress(NotFiniteError):  # which its end will say
                pixels = self.maker.pictures(self.maker.slots.latents(job.slot, job.step))
        order.tell(Event(picture=number, step=job.step, pixels=pixels))

    def _finish(self, job: Job) -> None:
        order, number, _ = job.what
        assert job.slot is not None, "it ran"
        try:
            pixels = self.maker.pictures(self.maker.slots.latents(job.slot, job.step))
        except NotFiniteError as error:
            LOG.warning("not finite", extra={"model": self.name, "reason": str(error)})
            self._end(order, End.REFUSED)
            return
        order.left -= 1
        order.tell(Event(picture=number, step=job.step, pixels=pixels, is_last=True))
        if not order.left:
            self._end(order, End.DONE)

    def _end(self, order: Order, end: End) -> None:
        """End an order, with whatever of it still runs or waits."""
        with self._changed:
            if order not in self._open:
                return
            del self._open[order]
        for job in order.jobs:
            self._scheduler.drop(job)
        order.left = 0
        order.tell(Event(end=end))


def reason_of(error: BaseException) -> Any:
    """What an operator is told of a failure; clients never are."""
    return str(error) if isinstance(error, TcDeployError) else repr(error)
