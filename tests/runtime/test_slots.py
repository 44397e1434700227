"""Samples that stand at different steps: each is what it is alone, whoever runs beside it and wherever it lies."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Made, MadeByCommands, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept import Keep
from serving.families import PLANS, family_bundle
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.load import load_target
from tc_deploy.errors import UsageError
from tc_deploy.manifest import Manifest
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.course import HD, STANDARD, Place, Tick
from tc_deploy.runtime.request import noise_of
from tc_deploy.runtime.slots import Sample, Slots, sizes_of
from tc_deploy.serving.scheduler import Job, Policy, Scheduler
from tc_deploy.types import FloatArray

SLOTS = 4
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
MIXES = 3
"""In the default run; the slow one takes 200."""


@dataclass(frozen=True)
class Asked:
    """One sample of a mix."""

    seed: int
    course: str = STANDARD
    guidance_scale: float = 2.5


@functools.cache
def conditions_of(path: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Conditions of a sample, its own and those of the other half."""
    manifest = read_bundle(path, None).manifest
    halves = []
    for salt in (0, 1):
        random = np.random.default_rng([seed, salt])
        drawn = {}
        for item in manifest.conditions:
            if item.classes is not None:
                value = np.array(item.classes if salt else random.integers(item.classes))
            elif item.dtype.startswith("float"):
                value = random.standard_normal(item.shape)
            else:
                value = np.ones(item.shape)
            drawn[item.name] = value.astype(item.dtype)
        halves.append(drawn)
    return halves[0], halves[1] if manifest.guided else {}


class Bench:
    """A bundle's slots, and what its samples are."""

    def __init__(self, path: Path, count: int = SLOTS) -> None:
        self.bundle = read_bundle(path, None)
        self.path = path
        self.slots = Slots(self.bundle, *load_target(path, self.bundle.manifest, self.bundle.backend), count)
        calls = {(variant, size): 1.0 + size for variant in range(3) for size in self.slots.sizes}
        self.scheduler: Callable[..., Scheduler] = functools.partial(
            Scheduler, slots=count, sizes=self.slots.sizes, call_s=calls, queue=100, patience_s=20.0
        )
        self._alone: dict[Asked, FloatArray] = {}

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def sample(self, asked: Asked) -> Sample:
        given, other = conditions_of(self.path, asked.seed)
        return Sample(
            course=self.slots.courses[asked.course],
            noise=noise_of(self.manifest.latent_shape, asked.seed, 1)[0],
            given=given,
            unconditional=other,
            guidance_scale=asked.guidance_scale if self.manifest.guided else None,
        )

    def run(self, asked: Sequence[tuple[float, Asked]], policy: Policy = Policy.ALIGNED) -> list[FloatArray]:
        """Samples that arrive at their times, to their last latents."""
        scheduler, now = self.scheduler(policy=policy), 0.0
        coming = collections.deque(sorted(enumerate(asked), key=lambda each: each[1][0]))
        found: dict[int, FloatArray] = {}
        while len(found) < len(asked):
            while coming and coming[0][1][0] <= now:
                number, (arrived, one) = coming.popleft()
                course = self.slots.courses[one.course]
                assert scheduler.submit([Job(course=course, arrived_s=arrived, what=(number, one))])
            for job in scheduler.admit(now):
                assert job.slot is not None
                self.slots.start(job.slot, self.sample(job.what[1]))
            tick = scheduler.tick(now)
            if tick is None:
                now = coming[0][1][0]
                continue
            self.slots.run(tick)
            now += 1.0 + tick.size
            for job in scheduler.done(tick, now):
                assert job.slot is not None
                found[job.what[0]] = self.slots.latents(job.slot, job.step)
        return [found[number] for number in range(len(asked))]

    def alone(self, asked: Asked) -> FloatArray:
        if asked not in self._alone:
            [self._alone[asked]] = self.run([(0.0, asked)])
        return self._alone[asked]

    def by_pipeline(self, asked: Asked) -> FloatArray:
        """The same by the runtime that batches whole requests."""
        given, other = conditions_of(self.path, asked.seed)
        with tc_deploy.load(self.path, batch_size=self.manifest.batch_size) as pipeline:
            arguments: dict[str, Any] = {"conditions": {name: value[None] for name, value in given.items()}}
            if self.manifest.guided:
                arguments["unconditional"] = {name: value[None] for name, value in other.items()}
                arguments["guidance_scale"] = asked.guidance_scale
            latents = noise_of(self.manifest.latent_shape, asked.seed, 1)
            made: FloatArray = pipeline(**arguments, latents=latents, full=asked.course == HD, decode=False).latents[0]
        return made


@pytest.fixture(scope="module", params=["mixed", pytest.param("pixart", marks=pytest.mark.slow), "flux"])
def bench(request: pytest.FixtureRequest, kept: Keep, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """DiT, PixArt and FLUX: class labels; a solver that looks back; a token index that samples share."""
    if request.param in PLANS:
        return Bench(family_bundle(request.param, kept, tmp_path_factory.mktemp(request.param)))
    made: Made = request.getfixturevalue(request.param)
    return Bench(made.bundle)


@pytest.mark.parametrize("course", [STANDARD, HD])
def test_a_sample_in_a_slot_is_what_the_pipeline_makes(bench: Bench, course: str) -> None:
    asked = Asked(3, course)
    expected = bench.by_pipeline(asked)
    assert relative_error(bench.alone(asked), expected) <= EQUAL
    # The comparison can tell the two courses apart.
    other = Asked(3, HD if course == STANDARD else STANDARD)
    assert relative_error(bench.alone(other), expected) > VISIBLE


@pytest.mark.parametrize("bundle", ["multistep", "pixel"])
def test_slots_serve_what_other_tests_export(bundle: str, request: pytest.FixtureRequest) -> None:
    """Other schedules, reuse, solvers, and a batch that is fixed."""
    made: Made | MadeByCommands = request.getfixturevalue(bundle)
    bench = Bench(made.bundle)
    mix = [(float(turn), Asked(turn, HD if turn == 2 else STANDARD)) for turn in range(5)]
    for found, (_, asked) in zip(bench.run(mix), mix, strict=True):
        assert relative_error(found, bench.by_pipeline(asked)) <= EQUAL


mixes = st.lists(
    st.tuples(
        st.floats(0, 60, allow_nan=False),
        st.builds(Asked, st.integers(0, 7), st.sampled_from([STANDARD, STANDARD, HD]), st.sampled_from([1.5, 4.0])),
    ),
    min_size=1,
    max_size=7,
)


def check_mix(bench: Bench, mix: list[tuple[float, Asked]], policy: Policy) -> None:
    for found, (_, asked) in zip(bench.run(mix, policy), mix, strict=True):
        assert relative_error(found, bench.alone(asked)) <= EQUAL


@settings(max_examples=MIXES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=mixes, policy=st.sampled_from(Policy))
def test_a_sample_alone_is_the_same_in_any_mix(bench: Bench, mix: list[tuple[float, Asked]], policy: Policy) -> None:
    check_mix(bench, mix, policy)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=mixes, policy=st.sampled_from(Policy))
def test_a_sample_alone_is_the_same_in_two_hundred_mixes(
    bench: Bench, mix: list[tuple[float, Asked]], policy: Policy
) -> None:
    check_mix(bench, mix, policy)


def walk(bench: Bench, slot: int, asked: Asked, others: Callable[[int], None], size: int = 2) -> FloatArray:
    """One sample in calls of a fixed size, something else happening between its ticks."""
    sample = bench.sample(asked)
    bench.slots.start(slot, sample)
    step = 0
    while step < sample.course.steps:
        kind = sample.course.kinds[step]
        assert kind is not None
        bench.slots.run(Tick(kind=kind, size=size, places=(Place(slot=slot, step=step),)))
        step = sample.course.following(step)
        others(step)
    return bench.slots.latents(slot, step)


def test_a_sample_is_the_same_to_the_bit_in_calls_of_one_size(bench: Bench) -> None:
    """In any slot, with any neighbour, one that failed too."""
    asked = Asked(1)
    expected = walk(bench, 0, asked, lambda step: None)
    spoilt = Sample(**{**bench.sample(Asked(5)).__dict__, "noise": np.full(bench.manifest.latent_shape, np.nan, "f")})
    for slot in range(SLOTS):
        neighbour = slot + 1 if slot + 1 < SLOTS else slot - 1
        bench.slots.start(neighbour, spoilt)

        def others(step: int, neighbour: int = neighbour) -> None:
            if step < spoilt.course.steps:
                kind = spoilt.course.kinds[0]
                assert kind is not None
                tick = Tick(kind=kind, size=2, places=(Place(slot=neighbour, step=0),))
                bench.slots.run(tick)

        assert np.array_equal(walk(bench, slot, asked, others), expected)
    # What the failed one left in its slot is gone.
    assert not np.isfinite(bench.slots.latents(SLOTS - 2, 1)).all()
    assert np.array_equal(walk(bench, SLOTS - 2, asked, lambda step: None), expected)


def test_slots_that_lie_apart_share_a_call_as_neighbours_do(bench: Bench) -> None:
    """To the bit, though the caches of the ones are copied together and those of the others read where they lie."""
    found = {}
    for slots in ((0, 1), (2, 3), (0, 3), (3, 0), (1, 3)):
        course = bench.slots.courses[STANDARD]
        for slot, seed in zip(slots, (1, 6), strict=True):
            bench.slots.start(slot, bench.sample(Asked(seed)))
        step = 0
        while step < course.steps:
            kind = course.kinds[step]
            assert kind is not None
            bench.slots.run(Tick(kind=kind, size=2, places=tuple(Place(slot=slot, step=step) for slot in slots)))
            step = course.following(step)
        found[slots] = [bench.slots.latents(slot, step) for slot in slots]
    for made in found.values():
        assert all(map(np.array_equal, made, found[0, 1]))
    assert relative_error(found[0, 1][0], found[0, 1][1]) > VISIBLE


def test_steps_that_skip_the_model_come_with_the_tick_before(kept: Keep, tmp_path: Path) -> None:
    bench = Bench(family_bundle("flux", kept, tmp_path))
    course = bench.slots.courses[STANDARD]
    # F c1 c1 F c2 c2, and c2 skips the model.
    assert [kind is None for kind in course.kinds] == [False, False, False, False, True, True]
    assert [course.following(step) for step in range(4)] == [1, 2, 3, 6]
    scheduler = bench.scheduler()
    assert scheduler.submit([Job(course=course, arrived_s=0.0)])
    [job] = scheduler.admit(0.0)
    bench.slots.start(0, bench.sample(Asked(3)))
    ticks = 0
    while job.step < course.steps:
        tick = scheduler.tick(0.0)
        assert tick is not None
        bench.slots.run(tick)
        scheduler.done(tick, 0.0)
        ticks += 1
    assert ticks == 4
    assert relative_error(bench.slots.latents(0, job.step), bench.by_pipeline(Asked(3))) <= EQUAL


def test_what_calls_cost_is_known_for_every_kind_and_size(bench: Bench) -> None:
    clock: Iterator[float] = iter(map(float, range(10_000)))
    seconds = bench.slots.measured(lambda: next(clock))
    variants = {kind.variant for course in bench.slots.courses.values() for kind in course.kinds if kind is not None}
    assert seconds == {(variant, size): 1.0 for variant in variants for size in (1, 2, 4)}
    assert relative_error(bench.run([(0.0, Asked(2))])[0], bench.by_pipeline(Asked(2))) <= EQUAL


def test_how_many_slots_a_call_may_have(mixed: Made, pixel: MadeByCommands) -> None:
    dynamic, fixed = read_bundle(mixed.bundle, None), read_bundle(pixel.bundle, None)
    assert sizes_of(dynamic, 6) == (1, 2, 4, 6)
    assert sizes_of(fixed, 4) == (2,)
    with pytest.raises(UsageError, match="slots must be at least 2, found 1"):
        sizes_of(fixed, 1)
    with pytest.raises(UsageError, match="slots must be at least 1, found 0"):
        sizes_of(dynamic, 0)
