"""Who runs when: under a clock that the test turns, with courses made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tc_deploy.runtime.course import Course, StepKind, Tick
from tc_deploy.serving.scheduler import Job, Policy, Scheduler

FULL, CACHED = StepKind(variant=0), StepKind(variant=1)


def course(line: str, *, shared: bool = False) -> Course:
    """``F c c . F``: full, cached, a step that skips the model."""
    marks = line.split()
    kinds = {
        "F": lambda step: FULL,
        "c": lambda step: StepKind(variant=1, index=step) if shared else CACHED,
        ".": lambda step: None,
    }
    variants = tuple({"F": 0, "c": 1, ".": 2}[mark] for mark in marks)
    return Course(name=line, variants=variants, kinds=tuple(kinds[mark](step) for step, mark in enumerate(marks)))


CYCLE, FULL_ONLY, SKIPPING = course("F c c F c c"), course("F F F"), course("F c . . F .")
COURSES = (CYCLE, FULL_ONLY, SKIPPING, course("F c F c", shared=True))
CALLS: Mapping[tuple[int, int], float] = {
    (variant, size): (4.0 if variant == 0 else 1.0) * (1 + size / 4) for variant in (0, 1) for size in (1, 2, 4, 8)
}


def scheduler(slots: int = 4, queue: int = 8, patience_s: float = 30.0, policy: Policy = Policy.ALIGNED) -> Scheduler:
    sizes = [size for size in (1, 2, 4, 8) if size <= slots]
    return Scheduler(slots=slots, sizes=sizes, call_s=CALLS, queue=queue, patience_s=patience_s, policy=policy)


def slots_of(tick: Tick | None) -> list[int]:
    assert tick is not None
    return [place.slot for place in tick.places]


def enter(one: Scheduler, *courses: Course, now_s: float = 0.0) -> list[Job]:
    jobs = [Job(course=each, arrived_s=now_s) for each in courses]
    assert one.submit(jobs)
    one.admit(now_s)
    return jobs


@dataclass
class Told:
    """What a simulation saw."""

    finished: dict[int, float] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    ticks: list[Tick] = field(default_factory=list)
    longest_wait_s: float = 0.0


@dataclass(frozen=True)
class Arrival:
    """A job of a simulation."""

    at_s: float
    course: Course
    deadline_s: float | None = None
    cancelled_s: float | None = None


def simulate(one: Scheduler, arrivals: Sequence[Arrival]) -> Told:
    """Let jobs come and time pass, and look at every decision."""
    told, now = Told(), 0.0
    events = sorted(
        [
            *((each.at_s, number, "come") for number, each in enumerate(arrivals)),
            *((each.cancelled_s, number, "go") for number, each in enumerate(arrivals) if each.cancelled_s is not None),
        ]
    )
    jobs: dict[int, Job] = {}
    for _ in range(100_000):
        while events and events[0][0] <= now:
            at_s, number, what = events.pop(0)
            each = arrivals[number]
            if what == "come":
                deadline_s = None if each.deadline_s is None else at_s + each.deadline_s
                job = Job(course=each.course, arrived_s=at_s, deadline_s=deadline_s, what=number)
                if one.submit([job]):
                    jobs[number] = job
                else:
                    told.refused.add(number)
            elif number in jobs and number not in told.finished and number not in told.late:
                told.cancelled.add(number)
                one.drop(jobs[number])
        told.late |= {job.what for job in one.expire(now)}
        one.admit(now)
        check_slots(one)
        tick = one.tick(now)
        if tick is None:
            assert not one.waiting, "nobody waits while all slots are free"
            if not events:
                return told
            now = max(now, events[0][0])
            continue
        check_tick(one, tick)
        told.ticks.append(tick)
        for place in tick.places:
            job = next(job for job in one.running if job.slot == place.slot)
            told.longest_wait_s = max(told.longest_wait_s, now - job.since_s)
        now += CALLS[tick.kind.variant, tick.size]
        for job in one.done(tick, now):
            told.finished[job.what] = now
    raise AssertionError("it never ends")


def check_slots(one: Scheduler) -> None:
    slots = [job.slot for job in one.running]
    assert slots == sorted(set(slots))


def check_tick(one: Scheduler, tick: Tick) -> None:
    assert tick.size in (1, 2, 4, 8)
    assert tick.places
    by_slot = {job.slot: job for job in one.running}
    for place in tick.places:
        assert by_slot[place.slot].step == place.step
        assert by_slot[place.slot].course.kinds[place.step] == tick.kind
    others = [job for slot, job in by_slot.items() if slot not in slots_of(tick) and job.kind == tick.kind]
    assert len(tick.places) <= tick.size
    assert len(tick.places) == tick.size or not others, "who stands at its kind of step comes along where there is room"


arrivals = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 80, allow_nan=False),
        st.sampled_from(COURSES),
        st.none() | st.floats(0.1, 60),
        st.none() | st.floats(0, 100),
    ),
    max_size=20,
)


@settings(max_examples=150)
@given(arrivals=arrivals, slots=st.sampled_from([1, 2, 4, 8]), queue=st.integers(0, 6), policy=st.sampled_from(Policy))
def test_every_job_ends_in_one_way(arrivals: list[Arrival], slots: int, queue: int, policy: Policy) -> None:
    told = simulate(scheduler(slots, queue, policy=policy), arrivals)
    ends = [set(told.finished), told.late, told.cancelled, told.refused]
    assert set().union(*ends) == set(range(len(arrivals)))
    assert all(not one & other for one, other in itertools.combinations(ends, 2))
    for number, at_s in told.finished.items():
        each = arrivals[number]
        took_s = sum(CALLS[kind.variant, 1] for kind in each.course.kinds if kind is not None)
        assert at_s >= each.at_s + took_s - 1e-9  # sums of floats in another order


@settings(max_examples=100)
@given(arrivals=arrivals, policy=st.sampled_from(Policy), patience_s=st.floats(0, 40))
def test_nobody_with_a_slot_is_passed_over_for_longer_than_the_bound(
    arrivals: list[Arrival], policy: Policy, patience_s: float
) -> None:
    """But for those who have waited longer, one call each, and the call that runs."""
    slots = 4
    told = simulate(scheduler(slots, queue=100, patience_s=patience_s, policy=policy), arrivals)
    assert told.longest_wait_s <= patience_s + (slots + 1) * max(CALLS.values())


@given(arrivals=arrivals, policy=st.sampled_from(Policy))
def test_the_same_events_give_the_same_ticks(arrivals: list[Arrival], policy: Policy) -> None:
    first, second = (simulate(scheduler(policy=policy), arrivals) for _ in range(2))
    assert (first.ticks, first.finished) == (second.ticks, second.finished)


def test_the_cheapest_call_is_served_so_that_all_meet_at_a_full_step() -> None:
    one = scheduler()
    enter(one, CYCLE)
    first = one.tick(0.0)
    assert first is not None
    assert (first.kind, first.size, slots_of(first)) == (FULL, 1, [0])
    one.done(first, 5.0)
    # Two more come at a full step; the first stands at two cached ones, which cost less even alone.
    enter(one, CYCLE, CYCLE, now_s=5.0)
    for now_s in (5.0, 6.25):
        tick = one.tick(now_s)
        assert tick is not None
        assert (tick.kind, slots_of(tick)) == (CACHED, [0])
        one.done(tick, now_s + 1.25)
    # Now all three stand at a full step; a call of four costs less per sample than two.
    tick = one.tick(7.5)
    assert tick is not None
    assert (tick.kind, tick.size, slots_of(tick)) == (FULL, 4, [0, 1, 2])


def test_the_oldest_goes_first_where_that_is_asked_for() -> None:
    steps = {}
    for policy in Policy:
        one = scheduler(policy=policy)
        enter(one, FULL_ONLY, CYCLE)
        tick = one.tick(0.0)
        assert tick is not None
        one.done(tick, 6.0)
        steps[policy] = slots_of(one.tick(6.0))
    assert steps == {Policy.ALIGNED: [1], Policy.OLDEST_FIRST: [0]}


def test_who_has_waited_for_the_bound_goes_before_the_oldest() -> None:
    one = scheduler(patience_s=5.0)
    enter(one, CYCLE)
    tick = one.tick(0.0)
    assert tick is not None
    one.done(tick, 4.0)
    enter(one, CYCLE, now_s=4.0)
    assert slots_of(one.tick(4.0)) == [0]
    assert slots_of(one.tick(9.5)) == [0]  # both have waited since 4, and the older one goes first
    tick = one.tick(9.5)
    assert tick is not None
    one.done(tick, 10.5)
    assert slots_of(one.tick(10.5)) == [1]  # though the other's cached step would cost less


def phases() -> Course:
    """``F c F c | F d F d``: the phases' cached steps are other calls."""
    variants = (0, 1, 0, 1, 0, 2, 0, 2)
    return Course(name="phases", variants=variants, kinds=tuple(StepKind(variant=variant) for variant in variants))


def in_the_second_phase(policy: Policy) -> Scheduler:
    """Two slots, one of them with a job that is past its first phase."""
    calls = {**CALLS, **{(2, size): CALLS[1, size] for size in (1, 2, 4, 8)}}
    one = Scheduler(slots=2, sizes=(1, 2), call_s=calls, queue=8, patience_s=1e9, policy=policy)
    enter(one, phases())
    for now_s in range(4):
        tick = one.tick(now_s)
        assert tick is not None
        one.done(tick, now_s + 1.0)
    return one


def test_who_shares_no_cached_step_with_those_that_run_starts_at_once_while_few_wait() -> None:
    one = in_the_second_phase(Policy.ALIGNED)
    [late] = enter(one, phases(), now_s=4.0)
    assert late.slot == 1


def test_where_a_whole_call_s_worth_wait_a_phase_is_not_divided() -> None:
    one = in_the_second_phase(Policy.ALIGNED)
    late = enter(one, phases(), phases(), now_s=4.0)
    assert [job.slot for job in late] == [None, None]
    for now_s in range(4, 8):
        tick = one.tick(now_s)
        assert tick is not None
        one.done(tick, now_s + 1.0)
    assert one.admit(8.0) == late
    divided = in_the_second_phase(Policy.OLDEST_FIRST)
    assert [job.slot for job in enter(divided, phases(), phases(), now_s=4.0)] == [1, None]


def test_steps_at_different_rows_of_a_shared_index_are_never_one_call() -> None:
    shared = course("F c F c", shared=True)
    mixed = scheduler()
    enter(mixed, shared)
    tick = mixed.tick(0.0)
    assert tick is not None
    mixed.done(tick, 4.0)
    enter(mixed, shared, now_s=4.0)
    assert slots_of(mixed.tick(4.0)) == [0]


def test_a_step_that_skips_the_model_takes_no_tick() -> None:
    told = simulate(scheduler(), [Arrival(0.0, SKIPPING)])
    assert [tick.places[0].step for tick in told.ticks] == [0, 1, 4]
    assert told.finished == {0: 11.25}


def test_all_pictures_of_a_request_come_in_or_none() -> None:
    one = scheduler(slots=2, queue=1)
    jobs = [Job(course=CYCLE, arrived_s=0.0) for _ in range(4)]
    assert not one.has_room(4)
    assert not one.submit(jobs)
    assert one.waiting == 0
    assert one.submit(jobs[:3])
    assert not one.has_room()
    one.admit(0.0)
    assert (len(one.running), one.waiting) == (2, 1)


@pytest.mark.parametrize("running", [True, False])
def test_a_job_that_is_cancelled_frees_its_place(running: bool) -> None:
    one = scheduler(slots=1, queue=1)
    first, second = enter(one, CYCLE, CYCLE)
    one.drop(first if running else second)
    assert one.has_room()
    one.drop(first if running else second)
    admitted = one.admit(1.0)
    assert admitted == ([second] if running else [])
    assert [job.slot for job in one.running] == [0]
