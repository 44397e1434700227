"""Which samples take a step together, and when a waiting one gets a slot: a state machine, told what time it is.

In: jobs, the time, what calls of the engine cost. Out: jobs that got a slot, ticks, jobs that are done or whose time is
up. The same events at the same times give the same decisions. Never: touches an engine, a clock or a thread.

A tick is of one kind of step, with as many of the jobs that stand there as one call takes, the oldest first. Nobody is
passed over for longer than a bound: who has waited that long at a step goes before. Otherwise the policy says which
kind:

aligned
    The one whose call costs least, so that jobs gather where it costs most, at full steps. While as many wait as there
    are slots, a job starts only where whoever runs shares its cached steps, too: those of another phase are other
    calls, and would divide every tick from then on. It waits no longer than they run.
oldest-first
    The one of the oldest job, whoever comes along.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tc_deploy.runtime.course import Course, Place, StepKind, Tick
from tc_deploy.schedule import FULL


class Policy(enum.StrEnum):
    """See the module."""

    ALIGNED = "aligned"
    OLDEST_FIRST = "oldest-first"


@dataclass(kw_only=True, eq=False)
class Job:
    """One sample that somebody waits for."""

    course: Course
    arrived_s: float
    deadline_s: float | None = None
    """When nobody waits any more."""
    what: Any = None
    """Whatever the caller wants to find again; not looked at."""
    slot: int | None = None
    step: int = 0
    """The next one that runs the model; T when it is done."""
    since_s: float = 0.0
    """When it came to this step, or into the queue."""
    number: int = field(default=0, repr=False)
    """In the order of arrival."""

    @property
    def kind(self) -> StepKind:
        """Of its next step."""
        kind = self.course.kinds[self.step]
        assert kind is not None, "a job stands at steps that run the model"
        return kind


class Scheduler:
    """See the module.

    Args:
        slots: how many samples run at a time.
        sizes: how many slots one call may have, ascending.
        call_s: what a call costs, by variant and number of slots.
        queue: jobs that may wait for a slot.
        patience_s: the bound on waiting.
        policy: what kind of step is next, and who gets a slot.
    """

    def __init__(
        self,
        *,
        slots: int,
        sizes: Sequence[int],
        call_s: Mapping[tuple[int, int], float],
        queue: int,
        patience_s: float,
        policy: Policy = Policy.ALIGNED,
    ) -> None:
        self._sizes, self._call_s = tuple(sizes), call_s
        self._queue_limit, self.patience_s, self._policy = queue, patience_s, policy
        self._slots: list[Job | None] = [None] * slots
        self._waiting: list[Job] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> list[Job]:
        """Jobs with a slot, in the order of their slots."""
        return [job for job in self._slots if job is not None]

    def has_room(self, count: int = 1) -> bool:
        """Whether so many jobs can come at once: into a free slot, or into the queue."""
        free = self._slots.count(None)
        return len(self._waiting) + count <= self._queue_limit + free

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Let jobs in, all or none; says which."""
        if not self.has_room(len(jobs)):
            return False
        for job in jobs:
            job.number, job.since_s = next(self._numbers), job.arrived_s
            self._waiting.append(job)
        return True

    def drop(self, job: Job) -> None:
        """Forget a job; its slot is free. Nothing happens to one that is not here."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif job.slot is not None and self._slots[job.slot] is job:
            self._slots[job.slot] = None

    def expire(self, now_s: float) -> list[Job]:
        """Drop the jobs whose deadline has come."""
        late = [
            job for job in (*self._waiting, *self.running) if job.deadline_s is not None and job.deadline_s <= now_s
        ]
        for job in late:
            self.drop(job)
        return late

    def admit(self, now_s: float) -> list[Job]:
        """Give free slots to those who wait, in the order of arrival."""
        admitted: list[Job] = []
        while self._waiting and None in self._slots and self._may_start(self._waiting[0], now_s):
            job = self._waiting.pop(0)
            job.slot, job.since_s = self._slots.index(None), now_s
            self._slots[job.slot] = job
            admitted.append(job)
        return admitted

    def tick(self, now_s: float) -> Tick | None:
        """The next call of the engine; None where nobody runs."""
        running = sorted(self.running, key=lambda job: job.number)
        if not running:
            return None
        kinds = list(dict.fromkeys(job.kind for job in running))
        overdue = [job for job in running if now_s - job.since_s > self.patience_s]
        if overdue:
            first = min(overdue, key=lambda job: job.since_s)
            running.sort(key=lambda job: job is not first)
            kinds = [first.kind]
        elif self._policy is Policy.OLDEST_FIRST:
            kinds = kinds[:1]
        alike = {kind: [job for job in running if job.kind == kind] for kind in kinds}
        kind = min(kinds, key=lambda kind: self._call_s[kind.variant, self._sizes[0]])
        size = self._size(kind.variant, len(alike[kind]))
        jobs = alike[kind][:size]
        return Tick(kind=kind, size=size, places=tuple(Place(slot=int(job.slot or 0), step=job.step) for job in jobs))

    def done(self, tick: Tick, now_s: float) -> list[Job]:
        """Note that a tick has run.

        Returns:
            The jobs that it finished; their slots are free.
        """
        finished = []
        for place in tick.places:
            job = self._slots[place.slot]
            if job is None:
                continue
            job.step, job.since_s = job.course.following(job.step), now_s
            if job.step == job.course.steps:
                self._slots[place.slot] = None
                finished.append(job)
        return finished

    def _may_start(self, job: Job, now_s: float) -> bool:  # noqa: ARG002 - a way to batch requests asks the time
        own = _next_cached(job)
        if self._policy is not Policy.ALIGNED or own is None or len(self._waiting) < len(self._slots):
            return True
        return all(_next_cached(other) in (own, None) for other in self.running)

    def _size(self, variant: int, jobs: int) -> int:
        """The call that serves the most of so many jobs per second; of equals the smaller."""
        return max(self._sizes, key=lambda size: (min(jobs, size) / self._call_s[variant, size], -size))


def _next_cached(job: Job) -> StepKind | None:
    """The next cached step of a job that runs the model; None where there is none."""
    return next((kind for kind in job.course.kinds[job.step :] if kind is not None and kind.variant != FULL), None)
