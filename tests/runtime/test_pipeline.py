"""Whole sampling runs: engines against PyTorch, and what a caller may rely on whatever else a pipeline is asked."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PIXEL_BATCH, Made, MadeByCommands, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

import tc_deploy
from tc_deploy import Pipeline, Step
from tc_deploy.errors import Cancelled, UsageError
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.runtime.pixels import images_from_pixels
from tc_deploy.schedule import FULL
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.types import FloatArray

LABELS = [3, 9, 0, 3, 7]
SEED = 11
BATCH = 3
VISIBLE = 100 * tolerance("onnxruntime", "fp32", "trajectory_max_rel")
"""A difference that no rounding makes."""
FIRST_OF_SEED_0 = [0.059911035, 0.015559634, -1.1644385, -0.13264713]
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BUNDLES = ("mixed", "multistep", "pixel")
each_bundle = pytest.mark.parametrize("bundle", BUNDLES)


def assert_close(found: FloatArray, expected: FloatArray) -> None:
    assert relative_error(found, expected) <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")


def sample_in_pytorch(
    made: Made, noise: FloatArray, labels: Sequence[int], *, full: bool = False, guidance_scale: float | None = None
) -> FloatArray:
    """The trajectory's end as diffusers' scheduler and the PyTorch model give it."""
    model = load_model(made.model)
    plan, tables = load_plan(made.plan)
    sampling = sampling_from_plan(plan)
    if guidance_scale is not None:
        sampling = dataclasses.replace(sampling, guidance_scale=guidance_scale)
    steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    conditions = {"class_labels": torch.tensor(labels, dtype=torch.int32)}
    run = (lambda _, inputs: model.forward(inputs)) if full else steps
    return denoise(model, sampling, torch.from_numpy(noise), conditions, run).numpy()


@pytest.fixture(scope="module")
def pipelines(mixed: Made, multistep: Made, pixel: MadeByCommands) -> Iterator[dict[str, Pipeline]]:
    """One open pipeline for each bundle; tests leave them usable."""
    with (
        tc_deploy.load(mixed.bundle, batch_size=BATCH) as first,
        tc_deploy.load(multistep.bundle, batch_size=BATCH) as second,
        tc_deploy.load(pixel.bundle) as third,
    ):
        yield dict(zip(BUNDLES, (first, second, third), strict=True))


@pytest.fixture(scope="module")
def pipeline(pipelines: dict[str, Pipeline]) -> Pipeline:
    """The mixed bundle's, with a batch of 3."""
    return pipelines["mixed"]


@pytest.fixture(scope="module")
def images(pipelines: dict[str, Pipeline]) -> dict[str, FloatArray]:
    """What each pipeline makes of LABELS and SEED."""
    return {name: pipeline(class_labels=LABELS, seed=SEED).latents for name, pipeline in pipelines.items()}


# ------------------------------------------------------------------------------------------------------ against PyTorch


@each_bundle
@pytest.mark.parametrize("full", [False, True], ids=["cached", "full"])
def test_a_trajectory_is_pytorch_s(
    bundle: str, full: bool, pipelines: dict[str, Pipeline], request: pytest.FixtureRequest
) -> None:
    made: Made = request.getfixturevalue(bundle)
    pipeline = pipelines[bundle]
    result = pipeline(class_labels=LABELS, seed=SEED, full=full)
    noise = pipeline.noise(SEED, len(LABELS))
    assert_close(result.latents, sample_in_pytorch(made, noise, LABELS, full=full))
    # The comparison can tell a cached run from a full one.
    assert relative_error(result.latents, sample_in_pytorch(made, noise, LABELS, full=not full)) > VISIBLE
    variants = pipeline.plan.run_schedule().variants
    full_steps = len(variants) if full else variants.count(FULL)
    assert (result.steps_full, result.steps_cached) == (full_steps, len(variants) - full_steps)


def test_another_guidance_scale_is_pytorch_s(mixed: Made, pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    noise = pipeline.noise(SEED, len(LABELS))
    for scale in (1.0, 5.5):
        found = pipeline(class_labels=LABELS, seed=SEED, guidance_scale=scale).latents
        assert_close(found, sample_in_pytorch(mixed, noise, LABELS, guidance_scale=scale))
        assert relative_error(found, images["mixed"]) > VISIBLE
    # The plan's own scale is back afterwards.
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images["mixed"])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_another_batch_size_gives_the_same_pictures(
    mixed: Made, images: dict[str, FloatArray], batch_size: int
) -> None:
    with tc_deploy.load(mixed.bundle, batch_size=batch_size) as pipeline:
        assert_close(pipeline(class_labels=LABELS, seed=SEED).latents, images["mixed"])


@each_bundle
def test_labels_given_as_an_array_are_labels(
    bundle: str, pipelines: dict[str, Pipeline], images: dict[str, FloatArray]
) -> None:
    found = pipelines[bundle](conditions={"class_labels": np.array(LABELS, np.int32)}, seed=SEED)
    assert np.array_equal(found.latents, images[bundle])


def test_an_unconditional_half_of_ones_own_is_used(pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    """Guidance away from a class: of each picture, or of all alike; away from itself it has no effect."""
    labels, other = ({"class_labels": np.array(values, np.int32)} for values in (LABELS, [5]))
    away = pipeline(conditions=labels, unconditional=other, seed=SEED).latents
    assert relative_error(away, images["mixed"]) > VISIBLE
    each = {"class_labels": np.repeat(other["class_labels"], len(LABELS))}
    assert np.array_equal(pipeline(conditions=labels, unconditional=each, seed=SEED).latents, away)
    itself = pipeline(conditions=labels, unconditional=labels, seed=SEED).latents
    assert_close(itself, pipeline(class_labels=LABELS, seed=SEED, guidance_scale=1.0).latents)


def test_pictures_are_the_latents_of_a_bundle_of_pixels(pipelines: dict[str, Pipeline]) -> None:
    result = pipelines["pixel"](class_labels=LABELS, seed=SEED)
    assert result.images is not None
    assert (result.images.shape, result.images.dtype) == ((len(LABELS), 8, 8, 3), np.uint8)
    assert np.array_equal(result.images, images_from_pixels(result.latents))
    assert pipelines["mixed"](class_labels=[0]).images is None


def test_pixels_run_from_black_to_white() -> None:
    grey = np.linspace(-1.5, 1.5, 7, dtype=np.float32).reshape(1, 1, 1, 7)
    assert images_from_pixels(grey).tolist() == [[[0, 0, 64, 128, 191, 255, 255]]]
    colours = np.stack([grey[:, 0], -grey[:, 0], np.zeros_like(grey[:, 0])], axis=1)
    images = images_from_pixels(colours)
    assert images.shape == (1, 1, 7, 3)
    assert images[0, 0, 0].tolist() == [0, 255, 128]


# ------------------------------------------------------------------------------------------- the same seed, bit for bit


@each_bundle
def test_a_seed_gives_the_same_bits_on_every_run(
    bundle: str, pipelines: dict[str, Pipeline], images: dict[str, FloatArray], request: pytest.FixtureRequest
) -> None:
    again = pipelines[bundle](class_labels=LABELS, seed=SEED).latents
    assert np.array_equal(again, images[bundle])
    made: Made = request.getfixturevalue(bundle)
    with tc_deploy.load(made.bundle, batch_size=pipelines[bundle].batch_size) as other:
        assert np.array_equal(other(class_labels=LABELS, seed=SEED).latents, again)


@each_bundle
def test_picture_i_of_a_request_is_that_of_seed_plus_i_alone(
    bundle: str, pipelines: dict[str, Pipeline], images: dict[str, FloatArray]
) -> None:
    for index, label in enumerate(LABELS):
        alone = pipelines[bundle](class_labels=[label], seed=SEED + index)
        assert np.array_equal(alone.latents[0], images[bundle][index])


@settings(max_examples=12)
@given(
    chosen=st.lists(st.integers(0, len(LABELS) - 1), min_size=1, max_size=2 * BATCH),
    companion=st.floats(-30, 30, width=32),
)
def test_a_picture_does_not_depend_on_its_companions(
    pipeline: Pipeline, images: dict[str, FloatArray], chosen: list[int], companion: float
) -> None:
    """Any pictures in any order, with a strange one at the end of the batch."""
    noise = pipeline.noise(SEED, len(LABELS))
    latents = np.concatenate([noise[chosen], np.full_like(noise[:1], companion)])
    found = pipeline(class_labels=[*(LABELS[index] for index in chosen), 5], latents=latents).latents
    for place, index in enumerate(chosen):
        assert np.array_equal(found[place], images["mixed"][index])


def test_different_seeds_and_labels_give_different_pictures(pipeline: Pipeline) -> None:
    found = pipeline(class_labels=[1, 1, 2], seed=SEED).latents
    other = pipeline(class_labels=[2], seed=SEED).latents
    assert relative_error(found[0], found[1]) > VISIBLE
    assert relative_error(found[0], other[0]) > VISIBLE


def test_noise_is_pinned(pipeline: Pipeline) -> None:
    """Seeds that users wrote down must keep their meaning, whatever the version of numpy."""
    noise = pipeline.noise(0, 3)
    assert (noise.shape, noise.dtype) == ((3, 4, 8, 8), np.float32)
    np.testing.assert_array_equal(noise[0].flat[:4], np.array(FIRST_OF_SEED_0, np.float32))
    for seed in (1, 2):
        assert np.array_equal(pipeline.noise(seed, 1)[0], noise[seed])
    assert abs(pipeline.noise(0, 200).std() - 1) < 0.01


# ------------------------------------------------------------------------------------------------------------- latents


def test_latents_stand_for_the_noise_of_a_seed(pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    noise = pipeline.noise(SEED, len(LABELS))
    for latents in (noise, noise.astype(np.float64), np.asfortranarray(noise)):
        found = pipeline(class_labels=LABELS, latents=latents, seed=99).latents
        assert np.array_equal(found, images["mixed"])


@each_bundle
@pytest.mark.parametrize("full", [False, True])
def test_values_that_are_not_finite_stay_in_their_request(
    bundle: str, full: bool, pipelines: dict[str, Pipeline], images: dict[str, FloatArray]
) -> None:
    batch = pipelines[bundle].batch_size
    latents = pipelines[bundle].noise(SEED, batch)
    # As large as a request may give them: they overflow on the way.
    latents[-1] = 3e38 / pipelines[bundle].manifest.solver.init_noise_sigma
    with Pipeline(pipelines[bundle].path, "onnxruntime", batch_size=batch, check_finite=False) as pipeline:
        # Step by step, as no picture can be made of them.
        *_, last = pipeline.steps(class_labels=LABELS[:batch], latents=latents, full=full)
        spoilt = last.read_latents()
        assert not np.isfinite(spoilt[-1]).any()
        assert full or np.array_equal(spoilt[:-1], images[bundle][: batch - 1])
        assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images[bundle])


# ------------------------------------------------------------------------------------------------------- step by step


@pytest.mark.parametrize("full", [False, True])
def test_steps_come_in_order_with_latents_of_their_own(pipeline: Pipeline, full: bool) -> None:
    labels = LABELS[:2]
    variants = (FULL,) * 10 if full else pipeline.plan.run_schedule().variants
    seen: list[FloatArray] = []
    for number, step in enumerate(pipeline.steps(class_labels=labels, seed=SEED, full=full)):
        assert (step.index, step.total, step.full) == (number, len(variants), variants[number] == FULL)
        latents = step.read_latents()
        assert latents.shape == (2, 4, 8, 8)
        copied = latents.copy()
        latents[:] = np.nan
        assert np.array_equal(step.read_latents(), copied)
        seen.append(copied)
    assert len(seen) == len(variants)
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(seen))
    assert np.array_equal(seen[-1], pipeline(class_labels=labels, seed=SEED, full=full).latents)


def test_every_step_is_pytorch_s(mixed: Made, pipeline: Pipeline) -> None:
    model, (plan, tables) = load_model(mixed.model), load_plan(mixed.plan)
    steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    expected: list[FloatArray] = []
    denoise(
        model,
        sampling_from_plan(plan),
        torch.from_numpy(pipeline.noise(SEED, BATCH)),
        {"class_labels": torch.tensor(LABELS[:BATCH], dtype=torch.int32)},
        steps,
        on_step=lambda step, inputs, latents: expected.append(latents.numpy()),
    )
    for step in pipeline.steps(class_labels=LABELS[:BATCH], seed=SEED):
        assert_close(step.read_latents(), expected[step.index])


@each_bundle
@pytest.mark.parametrize("taken", [1, 4])
def test_an_iterator_that_is_left_early_leaves_no_trace(
    bundle: str, taken: int, pipelines: dict[str, Pipeline], images: dict[str, FloatArray]
) -> None:
    pipeline = pipelines[bundle]
    for step in pipeline.steps(class_labels=[8], seed=5, full=taken == 1):
        if step.index + 1 == taken:
            break
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images[bundle])


def test_an_iterator_that_is_never_started_holds_nothing(pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    waiting = pipeline.steps(class_labels=LABELS[:1], seed=SEED)
    pipeline(class_labels=[1])
    *_, last = waiting
    assert np.array_equal(last.read_latents()[0], images["mixed"][0])


def test_a_caller_is_told_of_every_step_of_every_turn(pipeline: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    pipeline(class_labels=LABELS, on_step=lambda first, step: told.append((first, step.index)))
    assert told == [(first, index) for first in (0, BATCH) for index in range(10)]


# -------------------------------------------------------------------------------------------------------------- cancel


class Countdown:
    """Asks to cancel after it has been asked so many times."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.steps: list[int] = []

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0

    def on_step(self, _: int, step: Step) -> None:
        self.steps.append(step.index)


@pytest.mark.parametrize("after", [0, 1, 9, 10, 13])
def test_a_request_can_be_cancelled_before_any_step(
    pipeline: Pipeline, images: dict[str, FloatArray], after: int
) -> None:
    """10 steps a turn: after 10 the second turn has not begun."""
    countdown = Countdown(after)
    with pytest.raises(Cancelled, match=f"after {after % 10} of 10 steps"):
        pipeline(class_labels=LABELS, should_cancel=countdown, on_step=countdown.on_step)
    assert len(countdown.steps) == after
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images["mixed"])


def test_a_request_that_nobody_cancels_is_asked_once_a_step(pipeline: Pipeline) -> None:
    countdown = Countdown(1000)
    pipeline(class_labels=LABELS, should_cancel=countdown)
    assert countdown.left == 1000 - 20


def test_an_error_of_the_caller_s_leaves_the_pipeline_usable(pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    def on_step(first: int, step: Step) -> None:
        if step.index == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipeline(class_labels=LABELS, on_step=on_step)
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images["mixed"])


# ------------------------------------------------------------------------------------------------------------- threads


def test_two_pipelines_in_two_threads_are_independent(mixed: Made, multistep: Made) -> None:
    def run(made: Made, seed: int, barrier: threading.Barrier | None) -> list[FloatArray]:
        with tc_deploy.load(made.bundle, batch_size=2) as pipeline:
            if barrier is not None:
                barrier.wait(timeout=60)
            return [pipeline(class_labels=[1, 2], seed=seed + turn).latents for turn in range(3)]

    jobs = [(mixed, 0), (mixed, 50), (multistep, 0)]
    alone = [run(made, seed, None) for made, seed in jobs]
    barrier = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = [pool.submit(run, made, seed, barrier) for made, seed in jobs]
        for one, future in zip(alone, together, strict=True):
            assert all(map(np.array_equal, one, future.result(timeout=120)))


BUSY = "running another request; a pipeline serves one at a time"


@pytest.mark.parametrize(
    "intrude",
    [
        lambda pipeline: pipeline(class_labels=[1]),
        lambda pipeline: next(pipeline.steps(class_labels=[1])),
        lambda pipeline: pipeline.warmup(),
    ],
    ids=["call", "steps", "warmup"],
)
def test_a_second_thread_is_refused_and_the_first_not_disturbed(
    pipeline: Pipeline, images: dict[str, FloatArray], intrude: Callable[[Pipeline], object]
) -> None:
    refusals: list[str] = []

    def should_cancel() -> bool:
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(intrude, pipeline).exception(timeout=60)
        assert isinstance(error, UsageError)
        refusals.append(str(error))
        return False

    found = pipeline(class_labels=LABELS, seed=SEED, should_cancel=should_cancel)
    assert np.array_equal(found.latents, images["mixed"])
    assert len(refusals) == 20
    assert all(BUSY in refusal for refusal in refusals)


def test_two_iterators_of_one_pipeline_exclude_each_other(pipeline: Pipeline, images: dict[str, FloatArray]) -> None:
    first = pipeline.steps(class_labels=LABELS[:BATCH], seed=SEED)
    next(first)
    with pytest.raises(UsageError, match=BUSY):
        next(pipeline.steps(class_labels=[1]))
    with pytest.raises(UsageError, match=BUSY):
        pipeline.warmup()
    *_, last = first
    assert np.array_equal(last.read_latents(), images["mixed"][:BATCH])


# ----------------------------------------------------------------------------------------------------- open and closed


def test_everything_is_allocated_when_it_is_loaded(mixed: Made) -> None:
    with tc_deploy.load(mixed.bundle, batch_size=2) as pipeline:
        before = {name: id(buffer) for name, buffer in pipeline._buffers.items()}
        pipeline.warmup()
        for full in (True, False):
            pipeline(class_labels=LABELS, full=full)
        assert {name: id(buffer) for name, buffer in pipeline._buffers.items()} == before


def test_warming_up_changes_no_picture(mixed: Made, images: dict[str, FloatArray]) -> None:
    with tc_deploy.load(mixed.bundle, batch_size=BATCH) as pipeline:
        pipeline.warmup()
        assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, images["mixed"])


def test_a_closed_pipeline_says_so(mixed: Made) -> None:
    with tc_deploy.load(str(mixed.bundle)) as pipeline:
        assert pipeline.batch_size == 1
        running = pipeline.steps(class_labels=[1], seed=SEED)
        waiting = pipeline.steps(class_labels=[1])
        expected = pipeline(class_labels=[1], seed=SEED)
        next(running)
    pipeline.close()
    for use in (
        lambda: pipeline(class_labels=[1]),
        lambda: pipeline.steps(class_labels=[1]),
        pipeline.variants,
    ):
        with pytest.raises(UsageError, match="the pipeline is closed; load the bundle again"):
            use()
    # A run that had begun keeps what it needs.
    *_, last = running
    assert np.array_equal(last.read_latents(), expected.latents)
    for late in (lambda: next(waiting), pipeline.warmup):
        with pytest.raises(UsageError, match="the pipeline is closed"):
            late()


def test_a_pipeline_is_closed_by_an_error(mixed: Made) -> None:
    with pytest.raises(ZeroDivisionError), tc_deploy.load(mixed.bundle) as pipeline:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        pipeline.warmup()


def test_the_graphs_can_be_timed_one_by_one(pipelines: dict[str, Pipeline]) -> None:
    assert list(pipelines["mixed"].variants()) == ["full", "cached-2", "cached-1", "solver"]
    assert list(pipelines["pixel"].variants()) == ["full", "cached-1", "solver"]


def test_a_machine_that_runs_engines_needs_no_torch(mixed: Made) -> None:
    program = (
        "import sys, tc_deploy\n"
        "with tc_deploy.load(sys.argv[1]) as pipeline:\n"
        "    pipeline(class_labels=[1])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'accelerate'}\n"
        "heavy |= {f'tc_deploy.{room}' for room in ('models', 'tokencache', 'calibrate', 'export')}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(mixed.bundle)], check=True)


def test_a_batch_that_is_fixed_is_known(pipelines: dict[str, Pipeline]) -> None:
    assert pipelines["pixel"].batch_size == PIXEL_BATCH


def test_the_page_of_python_runs_a_bundle(mixed: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(mixed.copy(tmp_path / "engines" / "digits").parents[1])
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert len(names["result"].latents) == 3
